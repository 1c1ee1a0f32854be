"""The paper's claims, repeated: what was measured, by which rules, and its pictures."""
