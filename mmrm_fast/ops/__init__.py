"""Fused operators, one file an op: schema, reference, fake, autograd, public function."""
