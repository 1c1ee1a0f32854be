"""What never changes: the weight of a module in any form, and the factors that an adapter starts from."""
