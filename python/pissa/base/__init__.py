"""The frozen parts: the function of a layer, called its base, and the factors that an adapter starts from.

`classes.base_of` returns the `protocol.Base` of a module; no other code asks which kind of base a module is. A dense
base holds the weight as it was given (`weights.Dense`). A stored base holds a residual Q = W - s B0 A0 and the start
factors that Q lacks (`stored.StoredLinear`). A weight that bitsandbytes has quantised stays so (`bitsandbytes`). An
init method computes the start factors (`start`), and their `Origin` determines them.

A layer's `base_layer`, PEFT's name, is the module that it calls: the base's own, or, while adapters are merged, a dense
module with the merged weight.
"""
