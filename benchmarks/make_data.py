"""Writes the three data files of the benchmarks: `python -m benchmarks.make_data`. Same seed, same bytes.

Each row is {"prompt": [messages], "completion": [one assistant message]}: support questions, meetings to summarise,
sums to work out, texts to sort. The answers follow from the prompts, so there is something to learn. All of it is made
from the word lists below; nothing is copied from anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
TOKENS_PER_WORD = 1.33
TEMPLATE_TOKENS = 40
N_ROWS = {"short": 320, "mixed": 240, "long": 112}

NAMES = "Ada Ben Chloe Dmitri Elena Farid Grace Hugo Imani Jonas Keiko Liam Mira Noah Olga Priya Quentin Rosa Sven Tara"
PRODUCTS = (
    "coffee grinder", "desk lamp", "noise-cancelling headset", "robot vacuum", "bicycle light", "label printer",
    "travel router", "kitchen scale", "garden pump", "portable heater", "photo scanner", "smart thermostat",
    "rice cooker", "electric toothbrush", "baby monitor", "external drive", "standing desk", "doorbell camera",
)  # fmt: skip
FAULTS = {
    "does not switch on": ("plug the {p} into another socket", "hold the power button for ten seconds",
                           "check that the small fuse at the back is not black", "use the cable that came in the box"),
    "switches itself off after {n} minutes": ("clean the air vents of the {p} with a soft brush",
                                              "place it at least a hand's width from the wall",
                                              "turn off the sleep timer in the settings", "update its software"),
    "makes a loud rattling noise": ("put the {p} on a level surface", "tighten the four screws underneath",
                                    "take the front part off and remove what is stuck in it", "run it empty once"),
    "shows the error code E{n}": ("note down the code E{n}", "disconnect the {p} for {n} minutes",
                                  "reset it with the pin hole next to the plug", "send us a photo of the display"),
    "cannot be found by the app": ("switch on Bluetooth and location on your phone", "stand closer than {n} metres",
                                   "remove the {p} from the list of known devices", "pair it again from the app"),
    "arrived with a crack in its housing": ("do not use the {p} any more", "take a photo of the crack and of the box",
                                            "print the return label from your order page",
                                            "hand the parcel in within {n} days"),
    "loses its settings every night": ("replace the coin battery in the {p}", "set the clock once by hand",
                                       "save the profile under a new name", "leave it plugged in for {n} hours"),
    "smells of burnt plastic": ("unplug the {p} at once", "let it cool down for {n} minutes in the open air",
                                "look for a strip of packing tape that was not removed", "do not open the housing"),
}  # fmt: skip
MOODS = (
    "I am a little annoyed.", "No hurry.", "I need it tomorrow.", "It was a present.", "I like it otherwise.",
    "This is the second time.", "I could not find this in the manual.", "My neighbour has the same one.",
)  # fmt: skip
TASKS = ("the price list", "the new website", "the printer contract", "the visitor parking", "the spring catalogue",
         "the training plan", "the stock count", "the fire drill", "the newsletter", "the warranty text",
         "the delivery routes", "the job advert", "the customer survey", "the office plants", "the backup server",
         "the trade fair stand")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
TALK = (
    "I looked at {task} again and the numbers are {much} than we thought.",
    "Has anybody heard back from the people who look after {task}?",
    "Last week we spent {n} hours on {task}, which is {much} than planned.",
    "To be fair, {task} was never easy, and half of the team was away.",
    "My only worry about {task} is that the supplier changed the terms without telling us.",
    "Can we come back to {task} later? I would like to finish the other points first.",
    "The {n} complaints that came in were all about {task}, so we should not let it slide.",
    "I still think that {task} would be simpler if one person decided.",
    "There is a draft of {task} on the shared drive, but it is {n} days old.",
    "We could ask the interns to help with {task}, they have time until {day}.",
)
DECISIONS = (
    ("All right: I will finish {task} by {day}.", "{name} finishes {task} by {day}."),
    ("Then I take {task} and send everyone a draft on {day}.", "{name} sends a draft of {task} on {day}."),
    ("I will call them about {task} first thing on {day}.", "{name} calls about {task} on {day}."),
    ("Let us spend no more than {n} hundred euros on {task}; I will sign it on {day}.",
     "{name} signs at most {n} hundred euros for {task} on {day}."),
)  # fmt: skip
GOODS = ("apples", "notebooks", "candles", "screws", "tickets", "stamps", "tiles", "bulbs", "mugs", "seeds")
TOPICS = {
    "delivery": ("the parcel came {n} days late", "the driver left the box in the rain", "tracking stopped on {day}"),
    "billing": ("I was charged {n} euros twice", "the invoice has the wrong address", "the refund has not arrived"),
    "quality": ("the {p} broke on {day}", "the colour of the {p} is wrong", "the {p} feels cheap"),
    "praise": ("the {p} is better than I hoped", "your team answered within {n} minutes", "I would buy it again"),
}


def fill(rng: random.Random, text: str, **known: Any) -> str:
    """The template with what is known, and anything else drawn."""
    drawn = {
        "n": rng.randint(2, 48),
        "p": rng.choice(PRODUCTS),
        "day": rng.choice(DAYS),
        "task": rng.choice(TASKS),
        "much": rng.choice(("better", "worse", "far better", "a little worse", "more", "less")),
    }
    return text.format(**{**drawn, **known})


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def support(rng: random.Random, words: int) -> tuple[str, str]:
    """A customer with one or more faults; the answer gives each fault's steps in order."""
    name, n_faults = rng.choice(NAMES.split()), max(1, words // 110)
    asked, answered = [f"Hello, my name is {name}."], [f"Hello {name}, thank you for writing to us."]
    for fault, steps in rng.sample(list(FAULTS.items()), min(n_faults, len(FAULTS))):
        known = {"p": rng.choice(PRODUCTS), "n": rng.randint(2, 30)}
        opening = rng.choice(("My {p} {f}.", "Since yesterday my {p} {f}.", "I bought a {p} here and it {f}."))
        asked.append(opening.format(f=fault.format(**known), **known))
        asked += rng.sample(MOODS, rng.randint(0, 2))
        kept = steps[: max(2, min(len(steps), words // (16 * n_faults)))]
        numbered = " ".join(f"{i}. {capital(s.format(**known))}." for i, s in enumerate(kept, 1))
        answered.append(f"About the {known['p']}: {numbered}")
    answered.append(rng.choice(("Write again if it still happens.", "We are here until six.", "Good luck!")))
    return " ".join(asked), "\n".join(answered)


def meeting(rng: random.Random, words: int) -> tuple[str, str]:
    """The minutes of a meeting with decisions hidden in the talk; the answer lists the decisions."""
    people = rng.sample(NAMES.split(), rng.randint(3, 6))
    lines, decided, count = [], [], 0
    while count < words:
        name = rng.choice(people)
        if rng.random() < 0.4:
            known = {"task": rng.choice(TASKS), "day": rng.choice(DAYS), "n": rng.randint(2, 48)}
            said, kept = (t.format(name=name, **known) for t in rng.choice(DECISIONS))
            decided.append(f"- {capital(kept)}")
            count += len(kept.split())
        else:
            said = " ".join(fill(rng, rng.choice(TALK)) for _ in range(rng.randint(1, 3)))
        lines.append(f"{name}: {said}")
        count += len(lines[-1].split())
    answer = "\n".join(decided) or "- Nothing was decided."
    question = "List what was decided in this meeting, who does it and by when.\n\n" + "\n".join(lines)
    return question, f"{len(decided)} decisions were taken by {', '.join(people)}:\n{answer}"


def sums(rng: random.Random, words: int) -> tuple[str, str]:
    """A shopping sum with its steps."""
    picked = rng.sample(GOODS, max(2, min(len(GOODS), words // 22)))
    prices = [(good, rng.randint(2, 19), rng.randint(2, 9)) for good in picked]
    asked = ", ".join(f"{n} {good} at {price} euros each" for good, n, price in prices)
    steps = "\n".join(f"{n} x {price} = {n * price} for the {good}" for good, n, price in prices)
    total = sum(n * price for _, n, price in prices)
    return f"{rng.choice(NAMES.split())} buys {asked}. What does it cost?", f"{steps}\nTogether {total} euros."


def sort(rng: random.Random, words: int) -> tuple[str, str]:
    """Customer remarks to sort into topics."""
    remarks, answers = [], []
    for i in range(1, max(1, words // 14) + 1):
        topic = rng.choice(list(TOPICS))
        remarks.append(f"{i}. {capital(fill(rng, rng.choice(TOPICS[topic])))}.")
        answers.append(f"{i}: {topic}")
    asked = f"Sort each remark into one of {', '.join(TOPICS)}.\n" + "\n".join(remarks)
    return asked, "\n".join(answers)


KINDS: tuple[Callable[[random.Random, int], tuple[str, str]], ...] = (support, meeting, sums, sort)
SYSTEMS = ("You are a polite assistant of a small shop.", "Answer briefly.", "You help with office work.")


def tokens_wanted(rng: random.Random, kind: str) -> int:
    """About how many tokens a row should have. mixed: log-normal with a long tail, cut at 800."""
    if kind == "mixed":
        drawn = [math.exp(rng.gauss(math.log(210), 0.85)) for _ in range(20)]
        return max(40, round(next(n for n in drawn if n <= 800)))
    return rng.randint(80, 150) if kind == "short" else rng.randint(930, 1070)


def make_row(rng: random.Random, kind: str) -> dict[str, Any]:
    words = max(8, round((tokens_wanted(rng, kind) - TEMPLATE_TOKENS) / TOKENS_PER_WORD))
    maker = meeting if words > 300 else rng.choice(KINDS if words > 60 else (support, sums, sort))
    asked, answered = maker(rng, words)
    system = [{"role": "system", "content": rng.choice(SYSTEMS)}]
    prompt = [*system, {"role": "user", "content": asked}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answered}]}


def make(kind: str, n: int) -> str:
    """The file's text: n rows of a kind (short, mixed, long), each drawn from (kind, number)."""
    rows = (make_row(random.Random(f"{kind}/{i}"), kind) for i in range(n))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA, help="the folder to write into")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, n in N_ROWS.items():
        text = make(kind, n)
        (args.out / f"{kind}.jsonl").write_text(text, encoding="utf-8")
        print(f"{kind}.jsonl: {n} rows, {len(text.encode()):,} bytes, {hashlib.sha256(text.encode()).hexdigest()[:12]}")


if __name__ == "__main__":
    main()
