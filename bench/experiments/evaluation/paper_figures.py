"""What the paper reports for language models; for GLUE see `glue.PAPER`."""

from __future__ import annotations

_TASKS = ("GSM8K", "MATH", "HumanEval", "MBPP", "MT-Bench")

_TABLE_2 = {
    "LLaMA-2-7B": {
        "full": "49.13 7.29 21.20 35.59 4.91",
        "LoRA, Gaussian start": "42.85 5.50 18.35 35.50 4.59",
        "LoRA, Kaiming start": "43.23 5.90 18.21 35.47 4.56",
        "PiSSA": "53.22 7.47 21.92 37.24 4.88",
    },
    "Mistral-7B": {
        "full": "69.91 18.64 45.31 51.46 4.95",
        "LoRA, Gaussian start": "69.50 20.08 43.78 58.46 4.90",
        "LoRA, Kaiming start": "69.40 19.99 43.74 58.39 4.93",
        "PiSSA": "73.31 23.12 46.88 62.55 5.34",
    },
    "Gemma-7B": {
        "full": "72.09 22.71 47.02 55.67 5.40",
        "LoRA, Gaussian start": "75.11 30.41 53.70 65.58 4.98",
        "LoRA, Kaiming start": "74.53 29.90 53.57 65.25 4.97",
        "PiSSA": "77.78 31.33 54.31 66.17 5.64",
    },
}

TABLE_2: dict[str, dict[str, dict[str, float]]] = {
    model: {method: dict(zip(_TASKS, map(float, figures.split()), strict=True)) for method, figures in methods.items()}
    for model, methods in _TABLE_2.items()
}
"""Means of three runs by model, method and task: percent, and points of 10 for MT-Bench. All methods at one rate."""

FIGURE_6: dict[str, dict[str, tuple[float, float]]] = {
    "GSM8K": {
        "DeepSeek-MoE-16B": (40.3, 48.8),
        "LLaMA-2-7B": (42.3, 53.1),
        "LLaMA-2-13B": (56.2, 62.0),
        "Qwen1.5-7B": (58.2, 67.2),
        "Mistral-7B": (67.7, 72.9),
        "LLaMA-3-8B": (72.6, 76.8),
        "Gemma-7B": (74.9, 77.9),
        "Mixtral-8x7B": (77.1, 79.5),
        "LLaMA-3-70B": (81.73, 86.05),
    },
    "HumanEval": {
        "LLaMA-2-7B": (18.3, 22.0),
        "LLaMA-2-13B": (24.4, 32.9),
        "DeepSeek-MoE-16B": (32.5, 34.8),
        "Mistral-7B": (43.9, 46.9),
        "LLaMA-3-8B": (47.6, 52.4),
        "Gemma-7B": (53.7, 54.3),
        "Qwen1.5-7B": (57.9, 58.5),
        "Mixtral-8x7B": (56.7, 59.7),
    },
}
"""LoRA's and PiSSA's percentages, read off the figure to 0.1, but for LLaMA-3-70B's; QLoRA's and QPiSSA's for
DeepSeek-MoE-16B, Mixtral-8x7B and LLaMA-3-70B."""
