//! Admission, continuous batching, verification and KV service of the cloud.
