"""One measurement, in a process of its own: `python -m benchmarks.cases JSON`.

The JSON names a case (a function of this file), a side ("ours", or who else does the
same) and the case's settings; the last line printed is a JSON object of figures. A
process of its own, so that neither side inherits the other's memory or warm caches, and
so that the largest memory of a process is that of one side.

Both sides get the same model, token counts and LoRA (rank 16 on all seven projections).
No response may end before its last token, and rewards are random: only work is
measured. The first round of everything warms up and is not counted.
"""

import contextlib
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from frozen import linear
from plumbing.figures import Clock

RANK, BETA, LR = 16, 0.04, 1e-5

# ---------------------------------------------------------------------- the machine


def gemm_speed(seconds: float = 1.0) -> float:
    """FLOP/s of a large fp32 matrix product: what this machine can do right now."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048 ** 3 * best_rate([lambda: a @ b, lambda: linear(a, b)], seconds)


def product_rate(weight: torch.Tensor, rows: int, seconds: float = 1.0) -> float:
    """Bytes of `weight` (V, D) read a second by its product with so many rows."""
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype)
    products = [lambda: x @ weight.T, lambda: weight @ x.T, lambda: linear(x, weight)]
    return weight.numel() * weight.element_size() * best_rate(products, seconds)


def best_rate(products: list[Callable[[], object]], seconds: float) -> float:
    """Calls a second of the fastest of several functions for the same product."""
    best = 0.0
    for product in products:
        product()
        rounds, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds / len(products):
            product()
            rounds += 1
        best = max(best, rounds / (time.perf_counter() - started))
    return best


def resident(field: str = "VmRSS") -> float:
    """GB (10^9 bytes) of this process now; "VmHWM": the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError(f"no {field} in /proc/self/status; memory is measured on Linux only")


def forget_peak() -> None:
    """Let "VmHWM" start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def text_of(tokenizer, count: int) -> str:
    """A text of exactly `count` tokens."""
    ids = tokenizer.encode("how do i mend a wet book when the rain came in " * count)
    for shift in range(50):
        text = tokenizer.decode(ids[shift:shift + count])
        if len(tokenizer.encode(text)) == count:
            return text
    raise ValueError(f"no text of {count} tokens found")


# ------------------------------------------------------------------------- GRPO steps


def step(side: str, **case: object) -> dict:
    """Seconds of a whole GRPO step, by phase, and the largest memory."""
    if side == "ours":
        return our_step(**case)
    return trl_step(**case, compact="compact" in side,
                    checkpointing="no checkpointing" not in side)


def our_step(model: str, prompts: int, prompt_tokens: int, group_size: int,
             response_tokens: int, steps: int) -> dict:
    """`grpo.py`'s own functions, phase by phase."""
    import grpo
    import lora
    from loading import load
    from run import Prompt, Run
    from sample import sample_batch, score_batch

    base, tokenizer = load(model)
    text = text_of(tokenizer, prompt_tokens)
    tokenizer.stop_ids = [-1]  # nothing ends early
    settings = grpo.Settings(
        model=model, prompts_per_step=prompts, group_size=group_size, steps=steps,
        max_new_tokens=response_tokens, rank=RANK, beta=BETA, lr=LR).resolved()
    lora.attach(base, "policy", RANK, 2 * RANK)
    axes = ["politeness", "meaningfulness", "actionability", "safety"]
    run = Run(settings, base, tokenizer, axes, torch.ones(4),
              lambda _prompt, rows: torch.rand(len(rows), 4), {}, Path())
    chosen = [Prompt(text, tokenizer.encode(text), i) for i in range(prompts)]
    optimizer = torch.optim.AdamW(lora.parameters(base, "policy"), LR)

    def one(number: int) -> dict[str, float]:
        clock, started = Clock(), time.perf_counter()
        with clock("sampling"):
            sampled = sample_batch(run, chosen, number, group_size)
        batch = score_batch(run, chosen, sampled)
        grpo.update(run, batch, optimizer, clock)
        return {"all": time.perf_counter() - started, **clock.seconds}

    one(0)
    before = gemm_speed()
    forget_peak()
    rounds = [one(i) for i in range(1, steps + 1)]
    peak, after = resident("VmHWM"), gemm_speed()
    flops = count_flops(run, chosen)
    return {"rounds": rounds, "peak_gb": peak, "gemm": [before, after], "flops": flops,
            "tokens": prompts * group_size * response_tokens}


def count_flops(run, chosen: list) -> dict[str, float]:
    """FLOPs of the matrix products of a step's passes, counted by PyTorch.

    It does not know the CPU's fused attention, whose few FLOPs are left out.
    """
    import grpo
    import lora
    from sample import reference_hidden, sample_batch, score_batch

    def counter() -> FlopCounterMode:
        def onednn(x: list, weight: list, *_: object, **__: object) -> int:
            return 2 * math.prod(x) * weight[0]

        return FlopCounterMode(display=False, custom_mapping={
            torch.ops.mkldnn._linear_pointwise: onednn})

    batch = score_batch(run, chosen, sample_batch(run, chosen, 99,
                                                  run.settings.group_size))
    with counter() as counted:
        reference = [reference_hidden(run, batch, p) for p in range(len(chosen))]
    flops = {"reference": counted.get_total_flops()}
    with counter() as counted, lora.using(run.model, "policy"):
        for p in range(len(chosen)):
            grpo.train_group(run, batch, batch.reward, p, reference[p],
                             torch.zeros_like(batch.sampled.logp), on_policy=True)
    return flops | {"training": counted.get_total_flops()}


def trl_step(model: str, prompts: int, prompt_tokens: int, group_size: int,
             response_tokens: int, steps: int, compact: bool,
             checkpointing: bool) -> dict:
    """TRL's GRPOTrainer in fp32, its own defaults for everything that is not named.

    Args:
        compact: the head's product on response tokens only, as TRL does it on GPUs.
        checkpointing: TRL's default, which pays time for memory.
    """
    import transformers
    import trl.trainer.utils

    if compact:  # there it only chooses positions; the kernels have their own switch
        trl.trainer.utils._use_triton = lambda _device: True
    times: list[float] = []
    sampling: list[float] = []
    scoring: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs) -> None:
            # `train` has put it back, and `generate` would take it from here.
            trainer.model.get_base_model().generation_config.eos_token_id = None
            times.append(time.perf_counter())

        def on_step_end(self, *_args, **_kwargs) -> None:
            times[-1] = time.perf_counter() - times[-1]
            if len(times) == 1:
                forget_peak()

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(
            model, prompt_tokens, response_tokens, trl.GRPOConfig(
                folder, per_device_train_batch_size=prompts * group_size,
                num_generations=group_size, max_completion_length=response_tokens,
                max_steps=steps + 1, beta=BETA, learning_rate=LR, loss_type="grpo",
                gradient_checkpointing=checkpointing, use_cpu=True, bf16=False,
                report_to="none", save_strategy="no", logging_strategy="no",
                disable_tqdm=True))
        trainer.add_callback(Watch())
        for name, seconds in (("_generate", sampling),
                              ("_generate_and_score_completions", scoring)):
            setattr(trainer, name, timed(getattr(trainer, name), seconds))
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    rounds = [{"all": whole, "sampling": first, "reference": second - first,
               "training": whole - second} for whole, first, second in
              zip(times[1:], sampling[1:], scoring[1:], strict=True)]
    return {"rounds": rounds, "peak_gb": resident("VmHWM"),
            "tokens": prompts * group_size * response_tokens}


def trl_trainer(model: str, prompt_tokens: int, response_tokens: int, config):
    """A trainer whose responses all have `response_tokens` tokens."""
    import datasets
    import peft
    import transformers
    import trl

    from lora import PROJECTIONS

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    text, chance = text_of(tokenizer, prompt_tokens), random.Random(0)

    def rewards(completion_ids: list, **_: object) -> list[float]:
        assert all(len(row) == response_tokens for row in completion_ids)
        return [chance.random() for _ in completion_ids]

    count = config.per_device_train_batch_size // config.num_generations
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32),
        reward_funcs=rewards, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": text}] * count * config.max_steps),
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=2 * RANK,
                                    target_modules=list(PROJECTIONS)))
    # Nothing ends early (see `Watch`, too).
    trainer.generation_config.eos_token_id = None
    trainer.eos_token_ids = [-1]
    return trainer


def timed(function: Callable, seconds: list[float]) -> Callable:
    """The function, which also notes its seconds."""
    def call(*arguments, **options):
        started = time.perf_counter()
        result = function(*arguments, **options)
        seconds.append(time.perf_counter() - started)
        return result

    return call


# --------------------------------------------------------------------------- rollouts


def sampled(side: str, model: str, rows: int, prompt_tokens: int, response_tokens: int,
            steps: int) -> dict:
    """Seconds of `rows` responses to one prompt: ours against `generate`.

    `generate` computes the prompt for each row, unless it is handed a cache.
    """
    if side == "ours":
        from loading import load
        from sample import draw_uniforms, rollout

        base, tokenizer = load(model)
        ids = tokenizer.encode(text_of(tokenizer, prompt_tokens))
        tokenizer.stop_ids = [-1]
        uniforms = draw_uniforms(0, 0, 0, rows, response_tokens)[None]

        def one() -> None:
            rollout(base, tokenizer, [ids], uniforms)

        size = sum(p.numel() * p.element_size() for p in base.parameters())
        speed = product_rate(base.unembed.detach(), rows)
        rounds = timed_rounds(one, steps)
        peak = resident("VmHWM")
        speeds = [speed, product_rate(base.unembed.detach(), rows)]
        return {"rounds": rounds, "peak_gb": peak, "product_rate": speeds,
                "bytes": size * response_tokens, "tokens": rows * response_tokens}
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(text_of(tokenizer, prompt_tokens))] * rows)

    def one() -> None:
        cache = None
        if "shared" in side:
            cache = transformers.DynamicCache(config=base.config)
            with torch.no_grad():
                base.model(ids[:1, :-1], past_key_values=cache)
            cache.batch_repeat_interleave(rows)
        base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True,
                      temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                      max_new_tokens=response_tokens, past_key_values=cache)

    base.generation_config.eos_token_id = None  # nothing ends early

    return {"rounds": timed_rounds(one, steps), "peak_gb": resident("VmHWM"),
            "tokens": rows * response_tokens}


def timed_rounds(one: Callable[[], object], steps: int) -> list[dict[str, float]]:
    """Seconds of `steps` calls, after one that does not count; a peak of their own."""
    one()
    forget_peak()
    rounds = []
    for _ in range(steps):
        started = time.perf_counter()
        one()
        rounds.append({"all": time.perf_counter() - started})
    return rounds


# ----------------------------------------------------------- log-probs, LoRA, loading


def logprobs(side: str, rows: int, vocabulary: int, width: int, steps: int) -> dict:
    """log π of `rows` tokens from hidden states, forward and backward."""
    from logprob import naive, token_logprobs

    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    unembed = torch.randn(vocabulary, width) / 30
    targets = torch.randint(vocabulary, (rows,))
    if side.startswith("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import selective_log_softmax

    def one() -> None:
        hidden.grad = None
        if side == "trl selective":
            logp = selective_log_softmax(hidden @ unembed.T, targets)
        elif side == "trl chunked":  # what its GRPO runs today
            logp = ChunkedLogProbFunction.apply(
                hidden, unembed, None, targets, 1.0, 32768, None, 1.0,
                ("log_probs",))[0]
        else:
            function = naive if side == "naive" else token_logprobs
            logp = function(hidden, unembed, targets)
        logp.sum().backward()

    small = torch.randn(8, width, requires_grad=True)  # loads libraries, not memory
    naive(small, unembed[:64], targets[:8] % 64).sum().backward()
    start = resident()
    rounds = timed_rounds(one, steps)
    return {"rounds": rounds, "peak_gb": resident("VmHWM") - start}


def block(side: str, rows: int, tokens: int, steps: int) -> dict:
    """Forward and backward of two 0.5B blocks, LoRA on their seven projections.

    Two, because the first of a model gives no gradient to its input.
    """
    import lora
    from model import Config, Qwen

    sizes = {"vocab_size": 1000, "hidden_size": 896, "intermediate_size": 4864,
             "num_hidden_layers": 2, "num_attention_heads": 14,
             "num_key_value_heads": 2, "max_position_embeddings": 4096,
             "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    ids = torch.randint(1000, (rows, tokens))
    if side == "ours":
        model = Qwen(Config("qwen2", head_dim=64, rope_theta=1e6, **sizes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.requires_grad_(False)
        lora.attach(model, "policy", RANK, 2 * RANK)

        def one() -> None:
            with lora.using(model, "policy"):
                model(ids).sum().backward()
    else:
        import peft
        import transformers

        config = transformers.Qwen2Config(**sizes, rope_theta=1e6)
        model = peft.get_peft_model(
            transformers.Qwen2Model(config), peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules=list(lora.PROJECTIONS)))

        def one() -> None:
            model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()

    start = resident()
    return {"rounds": timed_rounds(one, steps), "peak_gb": resident("VmHWM") - start}


def loading(side: str, model: str) -> dict:
    """Seconds and largest memory of loading a checkpoint in fp32; no warm-up here."""
    from loading import load

    if side != "ours":
        import transformers
        import transformers.models.qwen2.modeling_qwen2
    with open(Path(model) / "model.safetensors", "rb") as file:  # a warm file cache
        while file.read(1 << 24):
            pass
    start = resident()
    forget_peak()
    started = time.perf_counter()
    if side == "ours":
        load(model, dtype=torch.float32)
    else:
        transformers.AutoTokenizer.from_pretrained(model)
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seconds = time.perf_counter() - started
    return {"rounds": [{"all": seconds}], "peak_gb": resident("VmHWM") - start}


CASES = {f.__name__: f for f in (step, sampled, logprobs, block, loading)}


@contextlib.contextmanager
def output_to_stderr() -> Iterator[None]:
    """Libraries print; only the figures may reach stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    with output_to_stderr():
        figures = CASES[settings.pop("case")](**settings)
    print(json.dumps(figures))
