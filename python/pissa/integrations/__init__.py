"""Programs that build their own PEFT model, and runtimes that read other layouts than ours."""

RUNTIMES = {
    "bnb4": "the 4-bit base of a QPiSSA adapter in bitsandbytes' format and a LoRA on it, exactly the trained model",
    "vllm": "a LoRA with experts one by one",
    "gguf": "a LoRA for llama.cpp",
    "merged": "one dense checkpoint",
}
"""What `pissa export` writes. A runtime that reads a LoRA in a layout of its own is a module of that name here with a
function `export_lora(adapter, base, target, initial)`."""
