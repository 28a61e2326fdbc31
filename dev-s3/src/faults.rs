//! Which faults are injected, how often, and the seeded dice that decide.

use std::{
    str::FromStr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};

/// Share of requests from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate(f64);

/// The text is no number from 0 to 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a rate is a number from 0 (never) to 1 (always), not {0:?}")]
pub struct BadRate(String);

impl Rate {
    pub const NEVER: Self = Self(0.0);
    pub const ALWAYS: Self = Self(1.0);

    pub fn new(share: f64) -> Result<Self, BadRate> {
        if (0.0..=1.0).contains(&share) { Ok(Self(share)) } else { Err(BadRate(share.to_string())) }
    }
}

impl FromStr for Rate {
    type Err = BadRate;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(share) => Self::new(share).map_err(|BadRate(_)| BadRate(text.to_owned())),
            Err(_not_a_number) => Err(BadRate(text.to_owned())),
        }
    }
}

/// The faults of a server. The default is none.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Delay before each request is looked at.
    pub latency: Duration,
    /// 500, nothing done.
    pub fail: Rate,
    /// A write is applied and then answered with 500.
    pub fail_after_apply: Rate,
    /// A conditional write is refused with 409, nothing done, as S3 does under concurrency.
    pub conflict: Rate,
    /// The request is carried out and the connection closed without an answer.
    pub drop_reply: Rate,
    /// The body of a read ends in the middle.
    pub truncate: Rate,
    /// `If-Match` and `If-None-Match` mean nothing: every writer wins.
    pub ignore_conditions: bool,
    /// An ETag in quotes never matches, as on Ceph RGW.
    pub refuse_quoted_etag: bool,
    /// Every write is refused with 403.
    pub read_only: bool,
}

/// The faults in force, and the dice.
#[derive(Debug)]
pub(crate) struct FaultCell {
    state: Mutex<(Faults, StdRng)>,
}

impl FaultCell {
    pub(crate) fn new(faults: Faults, seed: u64) -> Self {
        Self { state: Mutex::new((faults, StdRng::seed_from_u64(seed))) }
    }

    pub(crate) fn set(&self, faults: Faults) {
        self.with(|now, _| *now = faults);
    }

    /// Reads one of the settings.
    pub(crate) fn get<T>(&self, setting: impl FnOnce(&Faults) -> T) -> T {
        self.with(|faults, _| setting(faults))
    }

    /// Throws the dice for one of the rates.
    pub(crate) fn hits(&self, rate: impl FnOnce(&Faults) -> Rate) -> bool {
        self.with(|faults, dice| {
            let Rate(share) = rate(faults);
            share > 0.0 && dice.random::<f64>() < share
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Faults, &mut StdRng) -> T) -> T {
        // Nothing here panics half-way, so a poisoned lock still holds a whole value.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (faults, dice) = &mut *state;
        work(faults, dice)
    }
}
