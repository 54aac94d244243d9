"""Files come from strangers: whatever is in them, a program ends well or in one line.

* A seeded mutator damages checkpoints, tokenizers, adapters, JSONL files and run
  folders, by byte and by meaning. Each variant is loaded, or refused with a UserError;
  any other exception, a long wait, or a gigabyte of memory is a defect. The same files
  are loaded where nobody damaged them.
* slow: 500 variants of each kind; `VARIANTS=2000 pytest -m slow -k thousands` for more.
"""

import copy
import json
import os
import random
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch

import grpo
import loading
import lora
import reward_model
from model import Qwen
from plumbing.files import CHECKPOINT, CHECKSUMS, UserError
from plumbing.rows import read_rows
from run import BEFORE

SECONDS, GIGABYTES = 10, 1.0  # more than that is a hang, or too much

# ----------------------------------------------------------------------- the mutator

ODD = [None, True, -1, 0, 1, 2 ** 31, 2 ** 63, 2 ** 200, -2 ** 70, 0.5, 1e308, 1e-320,
       float("nan"), float("inf"), "", "x", "\x00", "\u202e", "../../etc/passwd",
       "/etc/passwd", "<|im_end|>", "a" * 100_000, [], {}, [[]], {"a": 1}, [1, "x"],
       "F32", "I64", [0, 10 ** 12], [10 ** 6, 10 ** 6], "{{ 1/0 }}",
       "{% for i in range(10**9) %}x{% endfor %}", "\ud800"]


def places(value, path=()):
    """Every place inside a JSON value, as the keys that lead there."""
    yield path
    items = (value.items() if isinstance(value, dict)
             else enumerate(value) if isinstance(value, list) else ())
    for key, inner in list(items)[:200]:
        yield from places(inner, (*path, key))


def change_json(value, chance: random.Random):
    """One meaningful change: a value replaced, removed, renamed, moved or repeated."""
    value = copy.deepcopy(value)
    path = chance.choice(list(places(value)))
    if not path:
        return chance.choice(ODD)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    kind, key = chance.randrange(4), path[-1]
    if kind == 0 and isinstance(holder, dict):
        holder[str(chance.choice(["", "x", "__class__", key + "2"]))] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder[key], (int, float)) and holder[key]:
        holder[key] *= chance.choice([-1, 2, 3, 1000, 10 ** 9, 0.5])
    else:
        holder[key] = copy.deepcopy(chance.choice(ODD))
    return value


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """One blind change: a cut, a flip, a repeat, an insertion."""
    data, at = bytearray(data), chance.randrange(max(1, len(data)))
    kind, end = chance.randrange(6), at + chance.choice([1, 2, 8, 100])
    if kind == 0:
        del data[at:]
    elif kind == 1:
        del data[at:end]
    elif kind == 2:
        data[at:end] = chance.randbytes(len(data[at:end]))
    elif kind == 3:
        data[at:at] = data[at:end] * chance.choice([1, 5])
    elif kind == 4:
        data[at:at] = chance.choice([b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"{" * 5000,
                                     b"[" * 5000, b'"', b"\n", b"1e999", b"NaN"])
    elif data:
        data[at] ^= 1 << chance.randrange(8)
    return bytes(data)


def change_text(value, chance: random.Random) -> bytes:
    text = json.dumps(change_json(value, chance))
    if chance.random() < 0.05:  # a key that stands twice
        text = text.replace("{", '{"prompt": 1, "prompt": 2, ', 1)
    return text.encode()


def change(path: Path, chance: random.Random) -> None:
    """Damage one file: half of the time blindly, else where it will be believed."""
    data = path.read_bytes()
    try:
        changed = change_meaning(path, data, chance)
    except (ValueError, IndexError, struct.error, RecursionError):  # damaged before
        changed = change_bytes(data, chance)
    path.write_bytes(changed)


def change_meaning(path: Path, data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.4:
        return change_bytes(data, chance)
    if path.suffix == ".safetensors":
        size = struct.unpack("<Q", data[:8])[0]
        header = change_text(json.loads(data[8:8 + size]), chance)
        length = len(header) if chance.random() < 0.9 else chance.choice(
            [0, size - 1, 2 ** 32, 2 ** 63, 10 ** 9])
        return struct.pack("<Q", length) + header + data[8 + size:]
    if path.suffix == ".jsonl":
        lines = data.decode().splitlines()
        at = chance.randrange(len(lines))
        lines[at] = change_text(json.loads(lines[at]), chance).decode()
        return "\n".join(lines).encode()
    return change_text(json.loads(data), chance)


# ------------------------------------------------------------------------- the kinds


def load_checkpoint(folder: Path) -> None:
    model, tokenizer = loading.load(folder)
    ids = tokenizer.chat("How do I mend a tap?\x00<|im_start|>")
    with torch.no_grad():
        model(torch.tensor([ids[:20]]))


def load_adapter(folder: Path, base: Qwen) -> None:
    try:
        lora.load(base, "x", folder)
    finally:
        if "x" in base.adapters:
            lora.detach(base, "x")


def load_reward_model(folder: Path, base: Qwen) -> None:
    try:
        scorer = reward_model.load(base, folder, "x")
        scorer.score([1, 2, 3], [[4, 5]])
    finally:
        if "x" in base.adapters:
            lora.detach(base, "x")


def read_labels(folder: Path, tokenizer: loading.Tokenizer) -> None:
    rows = read_rows(folder / "labels.jsonl", responses=True, labels=True)
    axes = list(dict.fromkeys(axis for row in rows for axis in row["scores"]))
    reward_model.make_groups(rows, axes, tokenizer)
    reward_model.split_rows(rows, "train", 0)


def resume_run(folder: Path, base: Path, root: Path) -> None:
    prompts = str(root / "prompts" / "prompts.jsonl")
    grpo.main(["--resume", str(folder), "--device", "cpu", "--model", str(base),
               "--prompts", prompts, "--reward", str(root / "reward")])


@pytest.fixture(scope="module")
def originals(tmp_path_factory, checkpoint):
    """Whole folders of each kind, their damaged files, and who loads them."""
    root, base = tmp_path_factory.mktemp("originals"), checkpoint("qwen2-tied")
    sharded = checkpoint("qwen2-untied-sharded")
    model, tokenizer = loading.load(base)
    lora.attach(model, "policy", 2, 4)
    lora.save(model, "policy", root / "adapter", str(base))
    rows = [{"prompt": f"Question {i}?", "response": word, "cut": False, "split": split,
             "scores": {"good": float(word == "Yes"), "odd": 0.5}}
            for i in range(6) for word in ("Yes", "No")
            for split in [("train", "test")[i % 2]]]
    (root / "labels").mkdir()
    (root / "labels" / "labels.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows))
    reward_model.main(["--model", str(base), "--epochs", "1", "--rank", "2", "--device",
                       "cpu", "--data", str(root / "labels" / "labels.jsonl"),
                       "--out", str(root / "reward")])
    interrupted(root / "run", base, root)
    for folder in root.iterdir():
        (folder / CHECKSUMS).unlink(missing_ok=True)  # a stranger has none
    return {
        "checkpoint": (base, ["config.json", "model.safetensors",
                              "generation_config.json"], load_checkpoint),
        "sharded checkpoint": (sharded, [
            "config.json", "model.safetensors.index.json",
            "model-00001-of-00003.safetensors"], load_checkpoint),
        "tokenizer": (base, ["tokenizer.json", "tokenizer_config.json"],
                      load_checkpoint),
        "adapter": (root / "adapter", ["adapter_config.json",
                                       "adapter_model.safetensors"],
                    lambda folder: load_adapter(folder, model)),
        "reward model": (root / "reward", ["reward.json", "head.safetensors",
                                           "adapter_config.json"],
                         lambda folder: load_reward_model(folder, model)),
        "labels": (root / "labels", ["labels.jsonl"],
                   lambda folder: read_labels(folder, tokenizer)),
        "run folder": (root / "run", ["config.json", CHECKPOINT, BEFORE,
                                      "metrics.jsonl", "samples.jsonl"],
                       lambda folder: resume_run(folder, base, root))}


def interrupted(folder: Path, base: Path, root: Path) -> None:
    """A run on the small random base that broke off after its second step of three."""
    inner = grpo.sample_batch
    (root / "prompts").mkdir()
    prompts = root / "prompts" / "prompts.jsonl"
    prompts.write_text("".join(
        json.dumps({"prompt": f"Question {i}?", "split": ("train", "heldout")[i % 2]})
        + "\n" for i in range(4)))

    def sample(run, chosen, step, group_size):
        if step == 3:
            raise RuntimeError("power cut")
        return inner(run, chosen, step, group_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "sample_batch", sample)
        with pytest.raises(RuntimeError, match="power cut"):
            grpo.main(["--model", str(base), "--prompts", str(prompts), "--reward",
                       str(root / "reward"), "--steps", "3", "--prompts-per-step", "1",
                       "--group-size", "2", "--max-new-tokens", "4", "--rank", "2",
                       "--eval-prompts", "1", "--save-every", "1", "--device", "cpu",
                       "--out", str(folder)])


# --------------------------------------------------------------------------- the test


class Hang(BaseException):
    """The alarm of a variant that takes too long."""


def ring(*_: object) -> None:
    raise Hang


def peak_gb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def try_variants(kind: tuple, count: int, folder: Path, seed: int = 0) -> dict:
    """Damage and load `count` times; figures, and what crashed."""
    original, names, load = kind
    report = {"tried": 0, "accepted": 0, "refused": 0, "crashed": [], "worst_gb": 0.0,
              "worst_seconds": 0.0}
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for number in range(count):
            chance = random.Random(seed * 1_000_003 + number)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original, folder)
            for _ in range(chance.choice([1, 1, 2])):
                change(folder / chance.choice(names), chance)
            Path("/proc/self/clear_refs").write_text("5")
            start, started = peak_gb(), time.monotonic()
            signal.alarm(SECONDS)
            try:
                load(folder)
                report["accepted"] += 1
            except UserError as error:
                report["refused"] += 1
                if len(str(error)) > 2000:
                    report["crashed"].append(f"variant {number}: a page of error")
            except BaseException as error:  # panics of Rust libraries too
                report["crashed"].append(f"variant {number}: {error!r}"[:300])
            finally:
                signal.alarm(0)
            report["tried"] += 1
            report["worst_seconds"] = max(report["worst_seconds"],
                                          time.monotonic() - started)
            report["worst_gb"] = max(report["worst_gb"], peak_gb() - start)
    finally:
        signal.signal(signal.SIGALRM, before)
    return report


KINDS = ["checkpoint", "sharded checkpoint", "tokenizer", "adapter", "reward model",
         "labels", "run folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_damaged_is_loaded(kind, originals, tmp_path):
    original, _, load = originals[kind]
    load(shutil.copytree(original, tmp_path / "x"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_loaded_or_refused(kind, originals, tmp_path):
    check(kind, 12, originals, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files_are_loaded_or_refused(kind, originals, tmp_path):
    check(kind, int(os.environ.get("VARIANTS", "500")), originals, tmp_path, 0)


def check(kind: str, count: int, originals: dict, tmp_path: Path, seed: int) -> None:
    report = try_variants(originals[kind], count, tmp_path / "x", seed)
    print(kind, {k: v if k != "crashed" else len(v) for k, v in report.items()})
    assert not report["crashed"], "\n".join(report["crashed"][:20])
    assert report["refused"] > count / 4  # the mutator does damage
    assert report["worst_gb"] < GIGABYTES
