"""`python -m prhs_cli` is the same as `prhs`."""

from prhs_cli.app import main

if __name__ == "__main__":
    main()
