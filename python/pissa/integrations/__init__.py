"""Programs that build their own PEFT model, and runtimes that read other layouts than ours."""

RUNTIMES = {
    "bnb4": "the 4-bit base of a QPiSSA adapter in bitsandbytes' format and a LoRA on it, exactly the trained model",
    "vllm": "a LoRA with experts one by one",
    "gguf": "a LoRA for llama.cpp",
    "gguf-model": "one GGUF file with the adapter in it (of a GGUF base, in its codes), and a Modelfile for Ollama",
}
"""The targets of `pissa export`."""
