"""Full batch: conjugate gradients with a line search. The decisions on scalars, and the two faces of the method."""
