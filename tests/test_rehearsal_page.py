"""The rehearsal's page in a real browser, headless Chromium. Run: pytest tests/test_rehearsal_page.py"""

import argparse
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from align.launch.engines import ENGINES, Run
from align.rehearsal import judging, page
from align.rehearsal.rehearse import Stage

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GB = 1 << 30
WIDTHS = (360, 768, 1280)
COMMAND = ["sft.py", "--model_name_or_path", "a-long-name/" * 9, "--lora_target_modules", "q_proj", "--do_train"]
KINDS = {"weights": 16 * GB, "activations": 60 * GB, "logits": 3 * GB, "gathered": 2 * GB, "optimizer": GB}
SEEN = {
    "peaks": {
        phase: {"total": 82 * GB, "by_kind": KINDS, "by_module": {"self_attn": 50 * GB, "post_attention_layernorm": GB}}
        for phase in ("loading", "forward", "backward", "optimizer", "evaluation", "saving", "generation")
    },
    "steps": [{"total": 17 * GB, "live": KINDS, "graphs": 9 + n, "flops": n, "bytes_sent": n} for n in range(1, 9)],
    "before": {"flops": 0, "bytes_sent": 0},
    "shapes": [{"shapes": [2, 256 + 64 * (n % 9)], "tokens": 512} for n in range(256)],
    "run": {"accumulation": 2, "world_size": 8, "max_steps": 500, "save_steps": 100, "save_total_limit": None}
    | {"output_dir": "out"},
    "files": {
        str(Path("out/checkpoint-2/optimizer.pt").resolve()): GB,
        str(Path("out/model.safetensors").resolve()): GB,
    },
    "host_reads": [{"file": "/a/site-packages/" + "deep/" * 30 + "er.py", "line": 9, "function": "f", "times": 1234}],
    "data": {"train": {"samples": 99999, "tokens": 12345678, "dropped": {"too long": 3}, "told": {}}},
    "useful": {"train": 0.954},
    "model": {"parameters": 69 * 10**9, "trained": 16 * 10**6, "adapted": {"q_proj": 80}},
    "loaded": [{"file": 9 * GB, "shared": 9 * GB, "own": 0, "in_parts": False}],
}


def make_report() -> dict:
    run = Run(ENGINES["deepspeed"], COMMAND, {"localhost": 8}, False, {}, None, False, 60, 60)
    files = {str(Path(name).resolve()): GB for name in ("out/checkpoint-2/optimizer.pt", "out/model.safetensors")}
    report = judging.judge(Stage(run), SEEN | {"files": files}, argparse.Namespace(card="gaudi2", card_memory=40))
    change = {"change": "--use_flash_attention " * 3, "peak": 39.5, "fits": True, "computed_tokens": 1.33}
    return report | {"fits_with": [change]}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("of_a_recipe", [False, True], ids=["one command", "a recipe"])
def test_the_page_fits_phones_and_desktops_and_says_nothing_on_the_console(of_a_recipe):
    report = make_report()
    text = page.render(judging.join([report, report]) if of_a_recipe else report, 40, judging.CARDS["gaudi2"])
    frames = "".join(f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px"></iframe>' for width in WIDTHS)
    script = """<script>onload = () => {
        const wide = [...document.querySelectorAll("iframe")].map(frame => {
            const page = frame.contentDocument, width = page.documentElement.clientWidth
            return [...page.querySelectorAll("*")].filter(part => part.getBoundingClientRect().right > width + 1)
                .map(part => frame.clientWidth + " px: " + part.outerHTML.slice(0, 99))})
        document.body.textContent = "<<" + JSON.stringify(wide) + ">>" }</script>"""
    Path("page.html").write_text(f"<!doctype html>{script}<body>{frames}")

    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--user-data-dir=browser", Path("page.html").resolve().as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    found = json.loads(html.unescape(re.search("&lt;&lt;(.*)&gt;&gt;", ended.stdout)[1]))
    assert found == [[] for _ in WIDTHS]
    assert "CONSOLE" not in ended.stderr
