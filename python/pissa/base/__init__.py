"""What never changes: the frozen function of a layer, its base, and the factors that an adapter starts from.

base        the frozen function itself. `kinds.base_of` gives the `protocol.Base` of a module; nobody else asks which
            kind of base a module is.
form        how the base keeps its weight: "implicit", the weight as it was given; "explicit", a dense residual; or the
            format of a quantised residual.
dense       a base whose module holds the weight as it was given (`weights.Dense`).
stored      a base of any form but implicit: it keeps a residual Q = W - s B0 A0 and the start factors that Q lacks
            (`stored.StoredLinear`).
bnb         a base whose whole weight bitsandbytes has quantised (in `bitsandbytes`). Its form is implicit.
start       the frozen factors A0 and B0 that an adapter starts from (`start.StartFactors`). An init method computes
            them; their `Origin` determines them.

PEFT's names: a layer's `base_layer` is the module that it calls. That is the base's own module, or, while adapters are
merged, a dense module of the merged weight.
"""
