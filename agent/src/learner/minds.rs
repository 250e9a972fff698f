//! The LSTMs of one storage: the champion, which speaks in the predictor, and shadows on trial, which read the same tokens
//! without effect. What the next token costs a shadow and its rival, in bits, goes into their contest.

use crate::models::{Active, Loaded, ModelsHandle, Pair, Scope, Signal};
use prestage_predictor::AccessPredictor;
use prestage_predictor::lstm::{Lead, State, Token, Weights};
use prestage_predictor::ordinals::Counts;
use std::collections::HashMap;
use std::sync::Arc;

/// Settled predictions that one value of the calibration is the mean of: their labels come in batches and share their fate.
const SETTLED: f64 = 64.0;

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Minds {
    champion: Option<(i64, Arc<Weights>)>,
    trials: Vec<Trial>,
    /// Settled predictions and their surplus when calibration was last reported.
    settled: (f64, f64),
}

/// A shadow of a scope beside its rival.
#[derive(Debug)]
struct Trial {
    scope: Scope,
    pair: Pair,
    /// `None`: prediction without a model.
    rival: Option<Arc<Weights>>,
    shadow: Arc<Weights>,
    machines: HashMap<u64, Machine>,
    losses: Vec<(f32, f32)>,
}

/// What both remember of one machine's stream.
#[derive(Debug, Default)]
struct Machine {
    shadow: State,
    rival: State,
    counts: Option<Box<Counts<64>>>,
}

/// The weights of a model in use, which were checked when it was taken into use.
fn weights(loaded: &Loaded) -> Option<Arc<Weights>> {
    match Weights::from_bytes(&loaded.weights) {
        Ok(weights) => Some(Arc::new(weights)),
        Err(error) => {
            tracing::warn!(model = loaded.id, %error, "model not used");
            None
        }
    }
}

impl Minds {
    /// Takes over which models are in use for the storage. One that stays goes on from where it is.
    pub(super) fn follow(&mut self, storage: &str, active: &Active, predictor: &mut AccessPredictor) {
        let champion = active.champion(storage);
        if champion.map(|loaded| loaded.id) != self.champion.as_ref().map(|(id, _)| *id) {
            self.champion = champion.and_then(|loaded| Some((loaded.id, weights(loaded)?)));
            self.install(predictor);
        }
        let mut before = std::mem::take(&mut self.trials);
        for (scope, models) in active.shadows(storage) {
            let (Some(pair), Some(shadow)) = (models.pair(), &models.shadow) else { continue };
            if let Some(same) = before.iter().position(|trial| trial.scope == *scope && trial.pair == pair) {
                self.trials.push(before.swap_remove(same));
                continue;
            }
            let rival = models.rival.as_ref().map(weights);
            // Without its rival's weights nothing can be said of the shadow.
            if let (Some(shadow), None | Some(Some(_))) = (weights(shadow), &rival) {
                let (scope, rival) = (scope.clone(), rival.flatten());
                self.trials.push(Trial { scope, pair, rival, shadow, machines: HashMap::new(), losses: Vec::new() });
            }
        }
    }

    /// The predictor is a new one.
    pub(super) fn install(&mut self, predictor: &mut AccessPredictor) {
        predictor.set_model(self.champion.as_ref().map(|(_, weights)| Arc::clone(weights)));
        self.settled = (0.0, 0.0);
    }

    /// The models read what came since the last call; contests and drift are told.
    pub(super) fn foretell(&mut self, storage: &str, predictor: &mut AccessPredictor, watch: &ModelsHandle) {
        let trials = &mut self.trials;
        predictor.listen(!trials.is_empty());
        predictor.foretell(|vm, token| trials.iter_mut().for_each(|trial| trial.read(vm, token)));
        for trial in trials.iter_mut().filter(|trial| !trial.losses.is_empty()) {
            watch.losses(&trial.scope, trial.pair, &trial.losses);
            trial.losses.clear();
        }
        let kept = predictor.calibration();
        let (settled, surplus) = (kept.settled - self.settled.0, kept.surplus - self.settled.1);
        if settled >= SETTLED {
            watch.observe(storage, Signal::Calibration, &[(surplus / settled) as f32]);
            self.settled = (kept.settled, kept.surplus);
        }
    }

    /// The machine is gone.
    pub(super) fn forget(&mut self, vm: u64) {
        self.trials.iter_mut().for_each(|trial| drop(trial.machines.remove(&vm)));
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let machine = |machine: &Machine| {
            size_of::<Machine>() + machine.counts.as_ref().map_or(0, |counts| counts.memory_bytes())
        };
        let trial = |trial: &Trial| {
            let rival = trial.rival.as_ref().map_or(0, |weights| weights.memory_bytes());
            trial.shadow.memory_bytes() + rival + trial.machines.values().map(machine).sum::<usize>()
        };
        self.champion.as_ref().map_or(0, |(_, weights)| weights.memory_bytes())
            + self.trials.iter().map(trial).sum::<usize>()
    }
}

impl Trial {
    fn read(&mut self, vm: u64, token: Token) {
        let Self { rival, shadow, machines, losses, .. } = self;
        let machine = machines.entry(vm).or_default();
        let mine = cost(shadow, &mut machine.shadow, token);
        let theirs = match rival {
            Some(rival) => cost(rival, &mut machine.rival, token),
            None => {
                let counts = machine.counts.get_or_insert_default();
                let [.., two] = counts.predict();
                counts.push(token.symbol());
                -two[usize::from(token.symbol())].log2()
            }
        };
        losses.push((theirs, mine));
    }
}

/// Bits that the next token costs a model, which then reads it.
fn cost(weights: &Weights, state: &mut State, token: Token) -> f32 {
    let mut score = [0f32];
    weights.score(state, Lead::Next, &[token.symbol()], &mut score);
    weights.step(state, token);
    -score[0] * std::f32::consts::LOG2_E
}
