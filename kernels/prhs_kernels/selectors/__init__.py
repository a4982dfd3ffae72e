"""The pre-hoc selectors CIS, PSAW and ETF, and the baselines they are compared with."""
