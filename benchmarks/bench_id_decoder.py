"""Peak memory and time of one training forward and backward of the ID decoder: ours against nn.MultiheadAttention.

    python -m benchmarks.bench_id_decoder                 # T=30 N=40 G=6, and N=100 for ours only
    python -m benchmarks.bench_id_decoder --quick         # seconds
    python -m benchmarks.bench_id_decoder --objects 100 --sides ours

The baseline is the direct implementation of MOTIP, section 3.3: one-hot products for the ID embedding, one attention
mask of (batch x heads, T*N, T*N) that includes the relative position bias, attention maps returned. Both have the same
weights and must give the same loss and gradients. Each runs in a separate process; "peak" is the highest resident size
during the step minus the resident size before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import Stopwatch, cores_allowed, memory_mb
from benchmarks.records import Recorder, add_flags, quantity
from motip.model.id_decoder import IdDecoder
from motip.model.spec import ModelSpec


class NaiveIdDecoder(nn.Module):
    """Same parameters and results as ``IdDecoder``, built from ``nn.MultiheadAttention``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim, depth = spec.embed_dim, spec.num_id_decoder_layers
        self.words, self.heads = spec.num_id_vocabulary + 1, dim // spec.head_dim
        self.id_dim = spec.id_dim
        self.rel_pos_embeds = nn.Parameter(torch.zeros(depth, spec.rel_pe_length, self.heads))
        self.word_to_embed = nn.Linear(self.words, spec.id_dim, bias=False)
        self.embed_to_word = nn.Linear(spec.id_dim, self.words, bias=False)

        def attention() -> nn.MultiheadAttention:
            return nn.MultiheadAttention(dim, self.heads, add_zero_attn=True, batch_first=True)

        inner = dim * spec.ffn_dim_ratio
        self.self_attn = nn.ModuleList(attention() for _ in range(depth - 1))
        self.self_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth - 1))
        self.cross_attn = nn.ModuleList(attention() for _ in range(depth))
        self.cross_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim)) for _ in range(depth)
        )
        self.ffn_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))

    @torch.no_grad()
    def copy_from(self, ours: IdDecoder) -> None:
        pairs: list[tuple[Tensor, Tensor]] = [
            (self.rel_pos_embeds, ours.rel_pos_embeds),
            (self.word_to_embed.weight, ours.word_to_embed.weight),
            (self.embed_to_word.weight, ours.embed_to_word_layers[0].weight),  # type: ignore[list-item]
        ]
        for mine, theirs in (
            (self.self_attn, ours.self_attn_layers),
            (self.self_norm, ours.self_attn_norm_layers),
            (self.cross_attn, ours.cross_attn_layers),
            (self.cross_norm, ours.cross_attn_norm_layers),
            (self.ffn, ours.ffn_layers),
            (self.ffn_norm, ours.ffn_norm_layers),
        ):
            pairs += list(zip(mine.parameters(), theirs.parameters(), strict=True))
        for target, source in pairs:
            target.copy_(source)

    def forward(
        self, history: Tensor, labels: Tensor, hidden: Tensor, objects: Tensor, hidden_now: Tensor | None = None
    ) -> Tensor:
        """history, objects (B,T,N,D); labels, hidden (B,T,N); hidden_now (B,T,N) of the objects, None: `hidden`."""
        hidden_now = hidden if hidden_now is None else hidden_now
        batch, frames, slots = labels.shape
        one_hot = torch.eye(self.words)
        history = torch.cat([history, self.word_to_embed(one_hot[labels])], -1).flatten(1, 2)
        newborn = torch.full_like(labels, self.words - 1)
        tokens = torch.cat([objects, self.word_to_embed(one_hot[newborn])], -1)
        times = torch.arange(frames).repeat_interleave(slots)
        ages = times[:, None] - times[None, :]
        future = (ages <= 0)[None] | hidden.flatten(1)[:, None, :]
        future = future[:, None].expand(-1, self.heads, -1, -1)
        for layer in range(len(self.cross_attn)):
            if layer > 0:
                flat = tokens.flatten(0, 1)
                attended, _ = self.self_attn[layer - 1](flat, flat, flat, key_padding_mask=hidden_now.flatten(0, 1))
                tokens = self.self_norm[layer - 1](flat + attended).view_as(tokens)
            bias = self.rel_pos_embeds[layer][ages.clamp(min=0)].permute(2, 0, 1)
            mask = bias[None].expand(batch, -1, -1, -1).masked_fill(future, float("-inf")).flatten(0, 1)
            flat = tokens.flatten(1, 2)
            attended, _ = self.cross_attn[layer](flat, history, history, attn_mask=mask)
            tokens = self.cross_norm[layer](flat + attended)
            tokens = self.ffn_norm[layer](tokens + self.ffn[layer](tokens)).view(batch, frames, slots, -1)
        return self.embed_to_word(tokens[..., -self.id_dim :])


def make_case(args: argparse.Namespace) -> tuple[IdDecoder, dict[str, Tensor]]:
    torch.manual_seed(0)
    spec = ModelSpec(
        num_id_vocabulary=max(50, args.objects),
        rel_pe_length=max(30, args.frames),
        use_decoder_checkpoint=args.checkpoint,
    )
    decoder = IdDecoder(spec)
    nn.init.normal_(decoder.rel_pos_embeds)
    shape = (1, args.groups, args.frames, args.objects)
    labels = torch.rand(1, args.groups, 1, spec.num_id_vocabulary).argsort(-1)[..., : args.objects].expand(shape)
    return decoder, {
        "history": torch.randn(*shape, spec.feature_dim),
        "objects": torch.randn(*shape, spec.feature_dim),
        "labels": labels.contiguous(),
        "hidden": torch.rand(shape) < 0.2,
    }


def run_side(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one implementation in this process: times, peak memory, loss and gradient norms."""
    torch.set_num_threads(args.threads)
    decoder, case = make_case(args)
    decoder.train()
    history, objects = case["history"].requires_grad_(), case["objects"].requires_grad_()
    model: nn.Module = decoder
    if args.side == "naive":
        model = NaiveIdDecoder(decoder.spec)
        model.copy_from(decoder)

    def step(frames: int) -> Tensor:
        past, now, labels, hidden = (x[:, :, :frames] for x in (history, objects, case["labels"], case["hidden"]))
        if args.side == "naive":
            logits = model(past[0], labels[0], hidden[0], now[0])
        else:
            times = range(frames)
            logits = model(past, labels, hidden, times, now, hidden, times)[0, 0]
        target = labels[0].masked_fill(hidden[0], -100)
        return nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=-100)

    # Warm-up: loads kernels and allocates gradients.
    step(2).backward()
    before = memory_mb("VmRSS")
    stopwatch = Stopwatch()
    for _ in range(args.repeats):
        model.zero_grad(set_to_none=False)
        history.grad = objects.grad = None
        with stopwatch:
            loss = step(args.frames)
            loss.backward()
    assert history.grad is not None and objects.grad is not None
    return {
        "wall s": stopwatch.wall_s,
        "CPU s": stopwatch.cpu_s,
        "peak MB": memory_mb("VmHWM") - before,
        "loss": loss.item(),
        "history_grad": history.grad.norm().item(),
        "objects_grad": objects.grad.norm().item(),
    }


def measure(args: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_id_decoder", "--side", side]
    for name in ("frames", "objects", "groups", "threads", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--checkpoint"] * args.checkpoint
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure the sides and record them; with both, check that they agree."""
    results = {side: measure(args, side) for side in args.sides}
    ours, naive = results["ours"], results.get("naive", {})
    for name in ("loss", "history_grad", "objects_grad") if naive else ():
        if abs(ours[name] - naive[name]) > 1e-3 * abs(naive[name]):
            raise SystemExit(f"the sides differ in {name}: {ours[name]} and {naive[name]}")
    recorder.add(
        f"T={args.frames}, N={args.objects}, G={args.groups}",
        {"threads": args.threads, "layers": 6, "channels": 512, "USE_DECODER_CHECKPOINT": args.checkpoint},
        "nn.MultiheadAttention, maps and masks materialised" if naive else None,
        [quantity(name, ours[name], naive.get(name)) for name in ("wall s", "CPU s", "peak MB")],
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--objects", type=int, default=40)
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--threads", type=int, default=min(2, cores_allowed()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", action="store_true", help="USE_DECODER_CHECKPOINT on our side")
    parser.add_argument("--sides", nargs="+", choices=["naive", "ours"], default=["naive", "ours"])
    parser.add_argument("--crowd", type=int, default=100, help="objects of a second run of ours only; 0: none")
    parser.add_argument("--side", choices=["naive", "ours"], help=argparse.SUPPRESS)
    add_flags(parser, "T=10 N=12 G=2, once")
    args = parser.parse_args(argv)
    if "ours" not in args.sides:
        parser.error("--sides must include ours")
    if args.quick:
        args.frames, args.objects, args.groups, args.repeats, args.crowd = 10, 12, 2, 1, 0
    return args


def main() -> None:
    args = parse_args()
    if args.side:
        print(json.dumps(run_side(args)))
        return
    recorder = Recorder("id_decoder", "ID decoder, one training forward and backward", args)
    compare(args, recorder)
    if args.crowd and args.objects != args.crowd:
        crowd = copy(args)
        # Masks and maps of the baseline would need six times its memory with 40 objects.
        crowd.objects, crowd.sides, crowd.repeats = args.crowd, ["ours"], 1
        compare(crowd, recorder)
    recorder.finish()


if __name__ == "__main__":
    main()
