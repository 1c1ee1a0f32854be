"""The parsers that are fuzzed, a module each; see fuzzing.parser."""
