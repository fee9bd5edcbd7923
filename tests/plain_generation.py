"""Generates with plain transformers, prompt by prompt; run by tests in a process that optimum-habana has not patched.

python plain_generation.py JOBS.json -> prints the texts of each job as JSON. A job is {"model", "prompts", "options"
(keywords of generate), "adapter" (optional)}.
"""

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(job: dict) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], attn_implementation="eager").eval()
    if "adapter" in job:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    texts = []
    for prompt in job["prompts"]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(
            input_ids=ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, pad_token_id=0, **job["options"]
        )
        ends = model.generation_config.eos_token_id
        output = output[0, : -1 if output[0, -1] in ends else None]
        prompt, whole = (tokenizer.decode(row, skip_special_tokens=True) for row in (ids[0], output))
        texts.append(whole[len(prompt) :])
    return texts


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps([answer(job) for job in json.load(file)]))
