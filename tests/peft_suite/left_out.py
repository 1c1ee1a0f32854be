"""What of PEFT's test suite does not apply to PiSSA, each with its reason."""

TESTS: dict[str, str] = {
    r"diffus": "diffusers is not installed",
    r"TestInjectAdapterFromStateDict|TestNoInfiniteRecursionDeepspeed": "PEFT's constructors cannot start an adapter",
    r"test_lora_(linear|embedding|conv2d)_(init_)?(default|gaussian)": "how LoRA draws A",
    r"_conversion_same_output_after_loading|test_(pissa|olora)_(rank|alpha)_pattern_and_rslora_raises": (
        "path_initial_model_for_weight_conversion: what we write needs no conversion"
    ),
    r"pissa_olora_warns|test_load_pissa_olora_with_other_adapter": "PEFT's PiSSA changes the base; ours does not",
    r"test_modules_to_save_targets_lora_layer_raises|test_fixed_rank_lora_config": "knows LoRA's class",
    r"low_cpu_mem_usage_works": "nothing is left on the meta device: no start factors could be had there",
    r"cache_dir": "downloads into an empty cache",
    r"missing_keys_warning|test_hotswap_missing_key": "a folder that lacks tensors is refused, not filled with zeros",
    r"TestDisableInputDtypeCasting|TestDoraCaching": "inner workings of PEFT's layers",
    r"TestLoraNestedConfigRoundTrip": "options of LoRA that PiSSA has not",
    r"test_from_peft_type": "needs scikit-learn, for another method",
    r"test_from_pretrained_(sanity_check|forward_compatible\[)": "another method's file is refused in our words",
    r"forward_compatible_load_from_peft_config": "a message names the class, which is PissaConfig",
    r"test_rank_higher_than_weight_dim_raises|test_converted_lora_(approximates|with_multiple)": "knows a size",
    r"test_converted_lora_to_lora_works_and_warns": "warns that LoRA is LoRA already; PiSSA is not",
    r"TestRankAndAlphaPattern": "layers of 1 x 1, which have no other rank than 1",
    r"test_set_peft_model_state_dict_preserves_input": "another base, whose start factors do not fit",
    r"targeting_lora_to_embedding_layer(\[.*auto|_non_transformers\[.*True)": (
        "a vocabulary is written where it has changed, so nothing is said where it has not"
    ),
    r"test_load_resized_embedding_ignore_mismatched_sizes": "expects torch's words for a base of another size",
    r"test_nb_params_large|test_model_with_injected_layers|applies_find_target_modules": "knows a rank or a size",
    r"TestTunerStateDictKeyPrefixes": "what is frozen beside the adapter has LoRA's prefix too",
    r"duplicate_name_without_mutation\[True\]|test_mixed_model_raises": "PEFT's mixed models take PEFT's methods only",
    r"test_mixed_adapter_batches_lora_with_dora_raises": "works with PiSSA",
    r"TestDecoderModelsTargetParameters.*mixed_adapter_batches": "refused in our words where experts are adapted",
    r"TestDecoderModelsTargetParameters::test_weighted_combination": "works with PiSSA",
    r"TestDecoderModelsTargetParameters::test_disable_adapter\[.*Llama4": (
        "allows 1e-6 where weights of deviation 1 make logits of 22, whose last bit is 2e-6: an expert's product is "
        "one of matrices here, and some CPUs round that otherwise than the batched one (PEFT: 1e-5 on Windows)"
    ),
    r"TestDecoderModelsTargetParameters::test_training_decoders": "an expert without tokens has no gradient",
    r"test_target_parameter_(on_top_level_module_raises|result_caching)": "PEFT's ParamWrapper",
    r"test_rank_pattern_for_moe_target_parameters|reuses_param_wrapper": "PEFT's ParamWrapper",
    r"test_config.*(test_save_pretrained|test_set_attributes)\[": "no targets are PEFT's default in this suite alone",
    r"test_hotswap_different_peft_types|test_targeting_trainable_tokens_raises": "knows LoRA's name",
    r"token_indices_targets_lora_layer": "knows LoRA's class",
    r"rank_padding_works": "knows the rank, which is 5 here",
    r"test_save_pretrained_warns_for_unsharded_state_dict": "a shard has no product; PEFT saves it with a warning",
    r"test_nemotron_h|test_past_kv": "a model that is not made here",
    r"test_override_lora_linear": "dispatches to a class of the test's own; our layers are not dispatched",
    r"TestDefaultTargetModules": "the default is all linear layers",
    r"TestModelAndLayerStatus::test_(adapter_model_type|peft_types|model_status_with)": (
        "the tuner and the type are our own, so that PEFT never takes dA and dB for A and B"
    ),
    r"test_prepare_model_for_compiled_hotswap": "prepares what is refused",
    r"test_key_mapping_save_old_load_new_lora": "layers have the names that the adapter was saved with",
}
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
    r"(TestRequiresGrad|similarly_named_sibling).*: the model is not the base that": "a base of other random weights",
    r": ignore_mismatched_sizes=True is not supported": "an adapter is restored as a whole",
    r"computes its experts in a way of its own": "experts that cannot be unfused",
    r"is a Conv\dd with groups=": "a grouped convolution has no weight that is one matrix",
    r"use_dora is for linear layers": "DoRA of other layers than linear ones",
    r"; PiSSA adapts nn.Linear, Conv1D": "a kind of layer that has no weight that is one matrix",
    r"are not weights of fused experts": "a parameter that is no layer",
    r"with target_modules='all-linear'": "target_parameters name single experts' parameters, all-linear all of them",
    r": a PissaConfig needs pissa.wrap": "PEFT's low-level functions cannot start the adapter",
    r": the model carries an adapter already": "wrapping a wrapped model",
    r": adapter_name: got .* could not be told apart": "an adapter of the name of a parameter",
    r": add_weighted_adapter: got combination_type=": "sums that are not exact",
    r": adapters: .* more than a low-rank change": "a sum of what is trained beside factors",
    r": rank \d+ is too large for layer": "a rank above the smaller side of the layer's weight",
    r": Incompatible PEFT types found: PISSA and LORA": "hot-swapping ends before anything is touched",
}
"""Regular expression for "test's id: error of ours" -> why it is right. Counts only if the model is as it was."""
