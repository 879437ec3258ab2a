"""A sliding-window language model, written with eager attention, run three ways.

    python examples/quickstart.py                       4096 tokens, on a GPU if there is one
    python examples/quickstart.py --tokens 8192 --engine tiled
    python -m refocus explain examples/quickstart.py:make

The model is transformers' Mistral with random weights, cut to 4 layers: hidden 512, 8 heads of 64, 2 key-value heads,
a window of 256 tokens. Its eager attention multiplies all queries with all keys and masks most of the scores away.
Refocus reads that, sees that a query needs 256 keys, and generates a kernel that computes just those. The model's code
and weights stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks/, which measures

from benchmarks.peers import COMPILE, EAGER, REFOCUS, Row, compare
from benchmarks.torchvision_ops import import_torchvision


def build(tokens: int, *, layers: int = 4, window: int = 256, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode and the keyword arguments of one call, float32."""
    import_torchvision()
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=tokens,
        sliding_window=window,
    )
    model = transformers.MistralModel._from_config(config, attn_implementation="eager").eval().to(device)
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
    return model, {"input_ids": ids, "use_cache": False}


def make() -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    """For `python -m refocus explain examples/quickstart.py:make`."""
    model, inputs = build(4096)
    return model, (), inputs


def measure(model: nn.Module, inputs: dict[str, Any], *, engine: str | None, repeats: int) -> dict[str, Row]:
    """All three peers, with a progress bar (or a line for each step, where the output is not a terminal)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    doing = {"compile": "first call of", "time": "timing", "memory": "memory of"}
    columns = (SpinnerColumn(), TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    console = Console()
    said: set[tuple[str, str]] = set()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        # For each of the three peers: a first call, a warm-up and the repeats, and one call for memory.
        task = progress.add_task("", total=3 * (repeats + 3))

        def on_step(peer: str, step: str) -> None:
            progress.update(task, advance=1, description=f"{doing[step]} {peer}")
            if not console.is_terminal and (peer, step) not in said:
                print(f"... {doing[step]} {peer}", flush=True)
            said.add((peer, step))

        return compare(model, inputs, engine=engine, repeats=repeats, budget=240, on_step=on_step)


def show(rows: dict[str, Row], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("time", "speed", "peak memory", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = {EAGER: "eager", COMPILE: "torch.compile alone", REFOCUS: "refocus"}
    for name, row in rows.items():
        table.add_row(
            names[name],
            f"{row.seconds * 1e3:.1f} ms",
            f"{rows[EAGER].seconds / row.seconds:.1f}x",
            "not known" if row.memory is None else f"{row.memory / 2**20:.0f} MiB",
            "reference" if name == EAGER else f"{row.difference:.1e}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"refocus is {rows[COMPILE].seconds / rows[REFOCUS].seconds:.1f}x as fast as torch.compile alone. Speed is "
        "against eager, peak memory is what one call needs beyond the model and its inputs, difference is the largest "
        "one from the eager output."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=256, help="keys that one query sees")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each")
    parser.add_argument("--engine", choices=("triton", "cpp", "tiled", "sdpa"), help="default: refocus chooses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    try:
        import rich  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as missing:
        raise SystemExit(f"This example needs {missing.name}: pip install 'refocus[test,report]'") from None
    import refocus
    from refocus.emit import emit_kernels

    model, inputs = build(options.tokens, layers=options.layers, window=options.window, device=options.device)
    rows = measure(model, inputs, engine=options.engine, repeats=options.repeats)
    title = f"Mistral, {options.layers} layers, {options.tokens} tokens, window {options.window}, {options.device}"
    show(rows, title)

    report = refocus.explain(model, engine=options.engine, **inputs)
    print(f"\n{report}")
    # The kernel that a GPU would run is plain source, and can be written and read on any machine.
    kernels = emit_kernels(model, **inputs)
    print("\nGenerated Triton source:")
    for text in dict.fromkeys(str(kernel.path or f"none for {kernel.location}: {kernel.reason}") for kernel in kernels):
        print(f"  {text}")


if __name__ == "__main__":
    main()
