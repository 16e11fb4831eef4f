"""Hold the method of examples/own_method.py to the contract that every method of the library keeps.

Run: python examples/check_own_method.py
"""

from own_method import Swap

from expunge.testing import eraser_checks

for check in eraser_checks(Swap):
    check.run()
    print(f"kept: {check.name}")
