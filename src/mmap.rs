//! Stub, to be replaced by its owner.
