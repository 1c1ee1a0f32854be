"""What of PEFT's test suite does not apply to PiSSA, each with its reason."""

TESTS: dict[str, str] = {}
"""Regular expression for a test's id -> why it is not run."""

_VARIANTS = (
    "alora_invocation_tokens|arrow_config|corda_config|ensure_weight_tying|eva_config|kasa_config|layer_replication|"
    "loftq_config|lora_bias|lora_ga_config|megatron_config|monteclora_config|runtime_config|use_bdlora|use_qalora|"
    "velora_config"
)

REFUSALS: dict[str, str] = {
    rf": ({_VARIANTS})=.* is not supported with PiSSA": "an option of LoRA that PiSSA has not",
    r": init_lora_weights=.* is not supported": "another start than PiSSA's; ours are init=",
    r": safe_serialization=False would write pickle": "pickle is never written",
    r"test_auto.py.*: the model is not the base that": "the same base in bfloat16 is another base",
    r"computes its experts in a way of its own": "experts that cannot be unfused",
    r"is a Conv\dd with groups=": "a grouped convolution has no weight that is one matrix",
    r"use_dora is for linear layers": "DoRA of other layers than linear ones",
    r"; PiSSA adapts nn.Linear, Conv1D": "a kind of layer that has no weight that is one matrix",
    r"are no weights of fused experts": "a parameter that is no layer",
    r"beside target_modules='all-linear'": "target_parameters name single experts' parameters, all-linear all of them",
    r": a PissaConfig needs pissa.wrap": "PEFT's low-level functions cannot start the adapter",
    r": the model carries an adapter already": "wrapping a wrapped model",
    r": rank \d+ is too large for layer": "a rank above the smaller side of the layer's weight",
}
"""Regular expression for "test's id: error of ours" -> why it is right. Counts only if the model is as it was before."""
