"""SYNTHETIC data for the GLUE tasks: the right columns and labels, with sentences of a toy grammar.

The data shows that training works, saves and resumes; a score on it says nothing about a model. A sentence fills five slots. In
a pair, each slot of the second sentence holds either a synonym of the first sentence's word or an unrelated word, and the share
of synonyms determines the label. Synonyms and unrelated words are disjoint, so a small model learns the labels in a few hundred
steps, except for the few that are wrong on purpose.
"""

from __future__ import annotations

import random

from datasets import Dataset, DatasetDict
from glue_tasks import TASKS, Task

SEED = 20
ROWS = {"train": 2400, "validation": 400, "test": 100}
WRONG_LABELS = 0.04
"""Share of wrong labels, as in real data: the loss stays above zero."""

# (word of the first sentence, its synonym, an unrelated word)
ADJECTIVES = """
large big red|small little blue|new fresh broken|rich wealthy hungry|quiet calm furious|young youthful wooden
famous renowned empty|local nearby frozen|private personal muddy|modern current hollow|strict stern yellow|busy occupied rusty
"""
SUBJECTS = """
company firm sailor|doctor physician gardener|teacher tutor pirate|police officers dancers|court tribunal orchestra
scientists researchers bakers|mayor alderman plumber|bank lender circus|airline carrier library|author writer goalkeeper
army troops tourists|farmer grower pianist
"""
VERBS = """
bought purchased painted|repaired fixed hid|began started forgot|praised lauded burned|found discovered ate
sent dispatched stole|built constructed buried|examined inspected sang|wanted desired feared|closed shut weighed
described depicted threw|guarded protected mocked
"""
OBJECTS = """
house home carrot|car automobile novel|ship vessel sandwich|road street violin|report document mountain
picture image engine|prize award ladder|garden park computer|letter message horse|film movie anchor|road path mirror
shop store planet
"""
TIMES = """
today now yesterday|often frequently once|quickly rapidly underwater|gladly happily alone|secretly covertly loudly
finally eventually never|carefully cautiously backwards|together jointly abroad
"""
SLOTS = [
    [tuple(entry.split()) for line in block.split("\n") for entry in line.split("|") if entry]
    for block in (ADJECTIVES, SUBJECTS, VERBS, OBJECTS, TIMES)
]
PRAISE = "superb moving witty graceful honest lively tender clever charming bold warm sharp funny deep radiant".split()
BLAME = "dull clumsy hollow tedious lazy bland shallow noisy stale cold awkward messy grim pointless tired".split()


def make_dataset(task_name: str, seed: int = SEED) -> DatasetDict:
    """Return all splits of one task. The same seed gives the same rows on every machine."""
    task = TASKS[task_name]
    splits = {}
    for number, split in enumerate(task.splits):
        chance = random.Random(seed * 100 + number)
        rows = [_row(task_name, task, chance, index) for index in range(ROWS[split.split("_")[0]])]
        splits[split] = Dataset.from_list(rows)
    return DatasetDict(splits)


def _row(task_name: str, task: Task, chance: random.Random, index: int) -> dict[str, object]:
    if task_name == "cola":
        texts, agreement = _acceptability(chance)
    elif task_name == "sst2":
        texts, agreement = _opinion(chance)
    else:
        texts, agreement = _pair(chance)
    return dict(zip(task.sentence_keys, texts, strict=True)) | {
        "label": _label(task, agreement, chance),
        "idx": index,
    }


def _label(task: Task, agreement: float, chance: random.Random) -> int | float:
    """Convert `agreement`, from 0 to 1, to a label of the task."""
    if task.is_regression:
        return round(5 * agreement, 1)
    label = min(int((1 - agreement) * task.num_labels), task.num_labels - 1)
    if chance.random() < WRONG_LABELS:
        label = (label + chance.randrange(1, task.num_labels)) % task.num_labels
    # Most tasks name the agreeing class last; the entailment tasks except wnli name it first.
    return label if task.labels[0] == "entailment" else task.num_labels - 1 - label


def _pair(chance: random.Random) -> tuple[tuple[str, ...], float]:
    concepts = [chance.choice(slot) for slot in SLOTS]
    share = chance.random()
    kept = [chance.random() < share for _ in concepts]
    first = [concept[0] for concept in concepts]
    second = [concept[1] if keep else concept[2] for concept, keep in zip(concepts, kept, strict=True)]
    return (_sentence(first), _sentence(second)), sum(kept) / len(kept)


def _opinion(chance: random.Random) -> tuple[tuple[str, ...], float]:
    share = chance.random()
    praise = [chance.random() < share for _ in range(5)]
    words = [chance.choice(PRAISE if praising else BLAME) for praising in praise]
    subject = chance.choice(("film", "story", "cast", "script", "music"))
    text = (
        f"a {words[0]} , {words[1]} and {words[2]} {subject} , {words[3]} to the end , and {words[4]} at that"
    )
    return (text,), sum(praise) / len(praise)


def _acceptability(chance: random.Random) -> tuple[tuple[str, ...], float]:
    words = _sentence([chance.choice(slot)[0] for slot in SLOTS]).split()
    acceptable = chance.random() < 0.5
    if not acceptable:
        at = chance.randrange(len(words) - 2)
        words[at : at + 2] = words[at + 1], words[at]
    return (" ".join(words),), float(acceptable)


def _sentence(words: list[str]) -> str:
    adjective, subject, verb, thing, time = words
    return f"the {adjective} {subject} {verb} the {thing} {time} ."
