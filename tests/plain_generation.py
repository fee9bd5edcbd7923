"""Generates with plain transformers, prompt by prompt; run by tests in a process that optimum-habana has not patched.

python plain_generation.py JOBS.json -> prints the texts of each job as JSON. A job is {"model", "prompts", "options"
(keywords of generate), "adapter" (optional), "scores" (optional: the processed scores of the first token instead)}.
"""

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

END_TOKENS = range(8, 512, 16)  # so many that random models end their texts, each at another length


def answer(job: dict) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], attn_implementation="eager").eval()
    if "adapter" in job:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    texts = []
    for prompt in job["prompts"]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"do_sample": False, "pad_token_id": 0} | job["options"]
        if "stop_strings" in options:
            options["tokenizer"] = tokenizer
        if job.get("scores"):
            options |= {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 1}
            scores = model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), **options).scores
            texts.append(scores[0][0].tolist())
            continue
        start = tokenizer.decode(ids[0], skip_special_tokens=True)
        for output in model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), **options).tolist():
            ends = (n for n, token in enumerate(output) if n >= ids.shape[1] and token in END_TOKENS)
            texts.append(tokenizer.decode(output[: next(ends, None)], skip_special_tokens=True)[len(start) :])
    return texts


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps([answer(job) for job in json.load(file)]))
