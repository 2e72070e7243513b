"""Linear layers of known models: (N, K) = (out_features, in_features), each shape once."""

from __future__ import annotations

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "smollm2": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "llama2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    # The experts of Qwen3-30B-A3B and Qwen3-235B-A22B: gate or up, and down.
    "qwen3-moe": ((768, 2048), (2048, 768), (1536, 4096), (4096, 1536)),
    # Those of the goals (goals.py): three large layers and two small ones.
    "goals": ((4096, 4096), (14336, 4096), (4096, 14336), (1536, 576), (576, 1536)),
}


def parse(text: str) -> list[tuple[int, int]]:
    """`smollm2`, `576x1536`, or several of either joined by commas; `576,1536` is one shape too."""
    if text.count(",") == 1 and text.replace(",", "").isdigit():
        text = text.replace(",", "x")
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        n, x, k = part.partition("x")
        if part in SHAPES:
            found += SHAPES[part]
        elif x and n.isdigit() and k.isdigit() and int(n) and int(k):
            found.append((int(n), int(k)))
        else:
            raise ValueError(f"shapes: wanted NxK or one of {', '.join(SHAPES)}, got {part!r}")
    return list(dict.fromkeys(found))
