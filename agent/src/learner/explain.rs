//! Why a page was or was not prefetched: what predictor, journal and cache know of it, in the words of the API.

use super::model::{Model, micros};
use prestage_cache::Cache;
use prestage_cache::types::{PAGE_BYTES, PageRange};
use prestage_integration::api::types::{BudgetUse, Explained, Governor, Place, Touch, Vote};
use prestage_predictor::{Decision, Explanation};

fn governor(explanation: &Explanation) -> Governor {
    let spending = explanation.spending;
    // Whole pages: the parts of one that reads earn are the governor's own business.
    let bytes = |pages: f32| pages.floor() as i64 * PAGE_BYTES as i64;
    Governor {
        floor: spending.floor,
        budget_bytes: bytes(spending.budget_pages),
        most_bytes: bytes(spending.most_pages).unsigned_abs(),
        withholds: explanation.decision == Decision::Withheld,
    }
}

impl Model {
    /// All but the disk's name and its latency.
    pub(super) fn explain(&self, page: u64, cache: &Cache, prefetch: bool, threshold: f32) -> Explained {
        let now_us = micros(cache.now());
        let explanation = self.predictor.explain(page);
        let place = cache.place(&self.handle, page);
        let budget = cache.budget(self.handle.id());
        let since = |at_us: u64| i64::try_from(i128::from(at_us) - i128::from(now_us)).unwrap_or(i64::MAX);
        let touched = match explanation.decision {
            Decision::Touched => explanation.active_us.map(|at_us| Touch { ago_us: now_us.saturating_sub(at_us) }),
            _ => None,
        };
        Explained {
            disk: String::new(),
            offset_bytes: page.saturating_mul(PAGE_BYTES as u64),
            place: Place {
                ram: place.ram,
                unread: place.unread,
                loading: place.loading,
                queued: place.queued,
                ssd: place.ssd,
            },
            prefetch,
            threshold,
            floor: explanation.floor,
            votes: explanation
                .votes
                .iter()
                .map(|vote| Vote {
                    expert: vote.expert.name().to_owned(),
                    raw: vote.raw,
                    calibrated: vote.calibrated,
                    weight: vote.weight,
                    due_us: vote.due_us.map(since),
                })
                .collect(),
            touched,
            attempts: self.journal.attempts(page, place, now_us),
            record_us: self.journal.span_us(now_us),
            miss_us: None,
            vain_cost: (threshold < 1.0).then(|| threshold / (1.0 - threshold)),
            governor: governor(&explanation),
            budget: BudgetUse {
                window_bytes: budget.window_bytes,
                in_flight_bytes: budget.in_flight_bytes,
                queued_bytes: PageRange { first: 0, count: budget.queued_pages }.bytes(),
            },
        }
    }
}
