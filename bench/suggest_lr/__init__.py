"""Whether the rate that `pissa.suggest_lr` finds is as good as the best of a sweep."""
