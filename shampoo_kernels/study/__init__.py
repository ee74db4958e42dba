"""How good the Kronecker approximation of a layer is: measurements, not part of any optimizer."""
