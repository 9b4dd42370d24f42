"""A converted chat model next to its parent: how often its next token is the same, and what both answer.

python -m tools.chat PARENT OUT.json ROUTED [ROUTED …] [--tokens 64]

The parent answers the prompts below greedily. *Agreement* is the share of the tokens of these answers that are the
routed model's likeliest, too, after the parent's tokens before them. OUT.json has all answers; stdout gets ten.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from dtfcli.loading.load import load_model, load_model_and_tokenizer, open_source
from dtfcli.models.pretrained import is_routed
from dtfcli.shares import measured_shares

PROMPTS = """
What is the capital of France?
Name three primary colors.
Why is the sky blue?
How many days does a week have?
What do plants need to grow?
Which planet is the largest in our solar system?
What is the boiling point of water?
Who wrote Romeo and Juliet?
What is photosynthesis?
Why do we have seasons?
Explain gravity to a child.
Explain what a computer program is, in two sentences.
What is the difference between weather and climate?
How does a vaccine work?
What causes tides?
Write a short poem about the sea.
Write a two-sentence story about a lost dog.
Write a haiku about autumn.
Describe a quiet village in the mountains.
Write the first line of a mystery novel.
Give me three ideas for a healthy breakfast.
How do I boil an egg?
Give me tips for learning a new language.
How can I sleep better?
What should I pack for a weekend by the lake?
How do I remove a coffee stain?
Plan a small birthday party.
Write a polite e-mail that asks for a day off.
Write a thank-you note to a teacher.
Write a title for an article about bees.
Summarize: The cat sat on the mat all day because it was warm, and left in the evening to hunt mice.
Rewrite more formally: hey, can you send me that file asap?
Correct the grammar: She don't like apples and he like them very much.
Translate into French: Good morning, my friend.
Turn into a question: The train leaves at noon.
List the words that rhyme with "light".
What is the opposite of generous?
Use the word "patience" in a sentence.
What is 7 times 8?
If I have 12 apples and give away 5, how many are left?
What is the next number: 2, 4, 8, 16?
How many minutes are in three hours?
A shirt costs 20 dollars and is reduced by 10 percent. What does it cost now?
Write a Python function that adds two numbers.
Write a Python loop that prints the numbers from 1 to 5.
What does the command `ls` do?
What is a variable in programming?
Is a tomato a fruit or a vegetable?
Should I take an umbrella if it looks like rain?
Who are you?
""".strip().splitlines()


def main() -> None:
    """Ask, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("out", type=Path)
    parser.add_argument("routed", nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    parent, tokenizer = load_model_and_tokenizer(open_source(args.parent))
    asked = [_prompt(tokenizer, prompt) for prompt in PROMPTS]
    answers = [_answer(parent, ids, args.tokens) for ids in asked]
    found: dict[str, Any] = {"prompts": PROMPTS, "parent": [tokenizer.decode(ids) for ids in answers], "routed": {}}
    for name in args.routed:
        model: Any = load_model(name)
        assert is_routed(model), name
        with measured_shares(model) as meter:
            same = [_same(model, ids, answer) for ids, answer in zip(asked, answers, strict=True)]
        found["routed"][Path(name).name] = {
            "agreement": sum(map(sum, same)) / sum(map(len, same)),
            "by_prompt": [sum(each) / len(each) for each in same],
            "routed_share": meter.read().overall,
            "answers": [tokenizer.decode(_answer(model, ids, args.tokens)) for ids in asked],
        }
    args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for name, each in found["routed"].items():
        sys.stdout.write(f"{name}: agreement {each['agreement']:.3f}, routed {each['routed_share']:.3f}\n")
    for place in range(0, len(PROMPTS), 5):
        sys.stdout.write(f"\n# {PROMPTS[place]}\nparent: {found['parent'][place]}\n")
        for name, each in found["routed"].items():
            sys.stdout.write(f"{name}: {each['answers'][place]}\n")


def _prompt(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return ids


def _answer(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The greedy answer, at least one token."""
    asked = torch.tensor([ids])
    written = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=tokens, do_sample=False)
    answer: list[int] = written[0, len(ids) :].tolist()
    return answer


@torch.inference_mode()
def _same(model: Any, ids: list[int], answer: list[int]) -> list[bool]:
    """For each token of an answer whether it is the model's likeliest after those before."""
    likeliest = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
    return [ours == theirs for ours, theirs in zip(likeliest, answer, strict=True)]


if __name__ == "__main__":
    main()
