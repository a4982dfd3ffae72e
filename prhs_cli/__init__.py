"""The `prhs` command line: parses, calls the calibration and kernel libraries, renders."""
