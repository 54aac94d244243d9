"""What a run will need: `python -m benchmarks.plan --size 14b`.

It takes the options of `grpo.py`, and prints the memory of such a run in fp32 and in
bf16, computed without any weights. On top come Python and the libraries' buffers. The
longest prompt counts: that of --prompts, or of the bundled file where the checkpoint is
a folder; else a prompt has 64 tokens. `--time` loads the model, too, and estimates from
a few passes how long the run will take on this machine.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import grpo
import lora
from loading import TINY, Tokenizer, base_name, known_config, load
from logprob import BLOCK_LOGITS
from model import Cache, Config, Qwen, micro_batches
from plumbing.figures import Clock, format_seconds, format_table
from plumbing.files import one_line_errors
from plumbing.options import option, parse_settings
from run import Prompt, read_prompts
from sample import draw_uniforms, rollout

PROMPT = 64  # tokens, where no prompt is read; the bundled ones have 51 (median) to 94


@dataclasses.dataclass(frozen=True)
class Settings(grpo.Settings):
    """Options of `python -m benchmarks.plan`: those of `grpo.py`, and one more."""

    time: bool = option(False, "load the model and estimate the run's time, too")


def plan(s: grpo.Settings) -> str:
    """A table of the memory that a run needs, in GB."""
    config, prompt = known_config(s.model), longest_prompt(s)
    largest = max(map(len, micro_batches([s.max_new_tokens] * s.group_size)))
    rows, columns = s.prompts_per_step * s.group_size, []
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode():  # tensors with a shape and no memory
            model = skeleton(config, dtype)
            lora.attach(model, "policy", s.rank, 2 * s.rank)
            activations = kept_for_backward(model, largest, s.max_new_tokens, prompt)
        adapter = sum(p.numel() for p in lora.parameters(model, "policy"))
        # The evaluation samples for as many prompts as a step has rows: their keys and
        # values, and the same again with room for the answers.
        cache = (rows * (2 * prompt + s.max_new_tokens) * 2 * config.num_hidden_layers
                 * config.num_key_value_heads * config.head_dim)
        columns.append([x / 1e9 for x in (
            config.num_parameters * dtype.itemsize,
            4 * 4 * adapter,  # fp32: itself, its gradient, AdamW's two moments
            max(cache * dtype.itemsize, activations),  # never held together
            # fp32 logits of policy and reference, and exp of both, of a block
            4 * 4 * min(BLOCK_LOGITS,
                        largest * s.max_new_tokens * config.vocab_size))])
    names = ["base (policy, reference and reward model)", "LoRA and AdamW",
             "sampling or a backward pass, the larger", "a block of the vocabulary"]
    table = [[name, *(f"{c:.2f}" for c in cells)]
             for name, *cells in zip(names, *columns, strict=True)]
    table.append(["together", *(f"{sum(column):.2f}" for column in columns)])
    return (f"{base_name(s.model)}: {config.num_parameters / 1e9:.2f} billion weights; "
            f"{s.prompts_per_step} prompts of {prompt} tokens × {s.group_size} "
            f"responses of {s.max_new_tokens}, rank {s.rank}\n"
            + format_table(["GB (10^9 bytes)", "float32", "bfloat16"], table))


def longest_prompt(s: grpo.Settings) -> int:
    """Tokens of the longest prompt that the run will read."""
    folder = Path(s.model)
    if not folder.is_dir():
        if s.prompts is None:
            return PROMPT
        folder = TINY  # it knows fewer words than Qwen, and counts more tokens
    prompts, held_out = read_prompts(s, Tokenizer(folder),
                                     known_config(s.model).max_position_embeddings)
    return max(len(p.ids) for p in prompts + held_out)


def skeleton(config: Config, dtype: torch.dtype) -> Qwen:
    """A frozen model of that type; `Module.to` cannot change fake tensors."""
    model = Qwen(config).requires_grad_(False)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.to(dtype), False))
    return model


def kept_for_backward(model: Qwen, rows: int, tokens: int, prompt: int) -> int:
    """Bytes that autograd keeps of one micro-batch (rows, tokens) and its prompt.

    With fake tensors nothing is computed, and what would be kept is counted.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata  # views of one tensor count once
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=model.device)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            lora.using(model, "policy"):
        prefix = Cache(model.config.num_hidden_layers)
        prefix.store = True
        model(ids(1, prompt), prefix)
        prefix.store = False
        model(ids(rows, tokens), prefix.detached())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@torch.no_grad()
def estimate_seconds(s: grpo.Settings) -> float:
    """How long the run will take here, from a scoring pass and three decoding steps."""
    model, tokenizer = load(s.model, s.device, s.dtype and getattr(torch, s.dtype))
    prompts, held_out = read_prompts(s, tokenizer, model.config.max_position_embeddings)
    prompt: Prompt = prompts[0]
    rows, length = s.prompts_per_step * s.group_size, s.max_new_tokens * 0.6
    block = torch.zeros(s.group_size, 32, dtype=torch.long, device=model.device)
    steps = min(3, s.max_new_tokens)  # no more than the context was checked for
    probe, clock = draw_uniforms(0, 0, 0, rows, steps)[None], Clock()
    model(block[:1, :1])  # the first call of a library loads it
    with clock("scoring"):
        model(block)
    with clock("sampling"):
        rollout(model, tokenizer, [prompt.ids], probe, s.temperature)
    per_token = clock.seconds["scoring"] / block.numel()
    per_decode = clock.seconds["sampling"] / (1 + steps)  # one more for the prompt
    # Scoring, reference; and an update: forward, backward, and the head's products.
    passes = 1 + (s.beta > 0) + 3 * s.inner_steps
    tokens = rows * length + s.prompts_per_step * len(prompt.ids)
    step = per_decode * s.max_new_tokens + passes * tokens * per_token
    answers = 2 * len(held_out) * (length + len(prompt.ids)) * 3 * per_token
    return s.steps * step + answers + 2 * len(held_out) / 16 * per_decode * length


def main(argv: list[str] | None = None) -> None:
    """Print the table, and the estimate where it is asked for."""
    s = parse_settings(Settings, __doc__.split("\n")[0], argv).resolved()
    print(plan(s))
    if s.time:
        print(f"about {format_seconds(estimate_seconds(s))} on this machine")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
