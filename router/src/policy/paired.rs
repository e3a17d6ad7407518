//! A rule bound to the models that are in use: what was fitted for one pair says nothing of another.

use std::sync::Arc;

use tandem_proto::ids::Digest;

use super::{Entropy, HiddenState, Policy, PolicyFile, PolicyFileError};

/// A policy on an edge with a known model, with what stands in for it where the cloud's model is not
/// the one it was fitted for. Rules without fitted parameters fit every pair.
#[derive(Debug, Clone)]
pub struct Paired {
    policy: Arc<dyn Policy>,
    stand_in: Option<Arc<dyn Policy>>,
}

impl Paired {
    /// Binds `policy` to the edge model with this digest and this size of a hidden state.
    ///
    /// # Errors
    /// [`PolicyFileError::OtherPair`] if its parameters were fitted for another edge model,
    /// [`PolicyFileError::Field`] if the file's entropy threshold is none, or if it reads another hidden
    /// state than the edge has at hand.
    pub fn new(policy: Arc<dyn Policy>, edge: &Digest, hidden_size: usize) -> Result<Self, PolicyFileError> {
        let stand_in: Option<Arc<dyn Policy>> = match policy.file() {
            None => None,
            Some(file) => {
                file.check_edge(edge)?;
                check_hidden(file, hidden_size)?;
                let entropy = Entropy::new(file.entropy_nats)
                    .map_err(|e| PolicyFileError::Field { field: "entropy_nats".into(), problem: e.to_string() })?;
                Some(Arc::new(entropy))
            }
        };
        Ok(Self { policy, stand_in })
    }

    /// The policy itself.
    #[must_use]
    pub fn policy(&self) -> &Arc<dyn Policy> {
        &self.policy
    }

    /// What stands in for it towards other models.
    #[must_use]
    pub fn stand_in(&self) -> Option<&Arc<dyn Policy>> {
        self.stand_in.as_ref()
    }

    /// The policy towards a cloud whose model has this digest (none while it is not known), and, if
    /// that is the stand-in, why: the entropy baseline with the file's threshold for it.
    #[must_use]
    pub fn towards(&self, cloud: Option<&Digest>) -> (&Arc<dyn Policy>, Option<PolicyFileError>) {
        match (&self.stand_in, self.policy.file(), cloud) {
            (Some(stand_in), Some(file), Some(cloud)) => match file.check_cloud(cloud) {
                Ok(()) => (&self.policy, None),
                Err(why) => (stand_in, Some(why)),
            },
            _ => (&self.policy, None),
        }
    }
}

/// The edge takes hidden states before the final norm.
fn check_hidden(file: &PolicyFile, size: usize) -> Result<(), PolicyFileError> {
    let Some(hidden) = &file.hidden else { return Ok(()) };
    let problem = if hidden.state != HiddenState::Raw {
        "is the state after the final norm, the edge has the one before it".to_owned()
    } else if hidden.size() != size {
        format!("has {} numbers, the edge model's state has {size}", hidden.size())
    } else {
        return Ok(());
    };
    Err(PolicyFileError::Field { field: "hidden".into(), problem })
}
