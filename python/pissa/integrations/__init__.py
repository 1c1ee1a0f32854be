"""Programs that build their own PEFT model, and runtimes that read other layouts than ours."""
