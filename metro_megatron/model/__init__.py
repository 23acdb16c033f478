"""The pair of encoders, on one tensor-parallel rank: mathematics in terms of megatron-core's layers."""
