"""Which runs to make at a fixed budget, and what they mean: allocation, plan, runner, fit and report."""
