"""For budgets in time: layers timed on a runtime, what that predicts of a plan, corrected by timing real networks."""
