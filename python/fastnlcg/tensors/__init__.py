"""What an optimizer works on: parameters, gradients, state, groups and files, on one rank or on many."""
