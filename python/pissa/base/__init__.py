"""What never changes: the frozen function of a layer, its base, and the factors that an adapter starts from.

`kinds.base_of` gives the `protocol.Base` of a module; nobody else asks which kind of base a module is. A dense one
holds the weight as it was given (`weights.Dense`), a stored one a residual Q = W - s B0 A0 and the start factors that Q
lacks (`stored.StoredLinear`), and what bitsandbytes has quantised stays so (`bitsandbytes`). Start factors, `start`,
are computed by an init method; their `Origin` determines them.

A layer's `base_layer`, PEFT's name, is the module that it calls: the base's own, or, while adapters are merged, a dense
module of the merged weight.
"""
