//! Simple forecasters. All speak in asinh(value / scale), each in quantiles of every step and of the maximum.
//!
//! | expert | says |
//! | --- | --- |
//! | last | the last value and the changes seen over as many steps |
//! | day, week | the same time the day (week) before, and how much days (weeks) differed |
//! | histogram | how often which value was, a day ago half as often as now |
//! | profile | what this program used at that hour elsewhere |

use super::history::View;
use super::summary::Summary;
use super::{Context, EXPERTS};

/// Quantiles of each step and of the maximum.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Opinion {
    pub(super) steps: Vec<[f32; 4]>,
    pub(super) peak: [f32; 4],
}

/// The network's place among the experts; what is not there says nothing.
pub(super) const NETWORK: usize = 0;
pub(super) const LAST: usize = 1;

/// What all but the network say of `steps` steps.
pub(super) fn ask(
    view: &View<'_>,
    summary: &Summary,
    context: &Context<'_>,
    steps: usize,
) -> [Option<Opinion>; EXPERTS] {
    let z = |value: f32| (value / summary.scale).min(1e20).asinh();
    let last = z(view.last());
    let add = |base: f32, spread: [f32; 4]| spread.map(|change| base + change);
    let change = Opinion {
        steps: (1..=steps).map(|h| add(last, summary.change(h))).collect(),
        peak: add(last, summary.rise(steps)),
    };
    let day = view.day();
    let season = |days: usize, spread: Option<[f32; 4]>| {
        let spread = spread?;
        let back = |h: usize| (h.div_ceil(days * day)) * days * day - h;
        let at: Vec<f32> = (1..=steps).map(|h| z(view.ago(back(h)))).collect();
        let highest = at.iter().copied().fold(0.0, f32::max);
        Some(Opinion { steps: at.iter().map(|base| add(*base, spread)).collect(), peak: add(highest, spread) })
    };
    let histogram = Opinion { steps: vec![summary.histogram; steps], peak: summary.histogram_peak };
    let profile = context.profile.and_then(|profile| {
        let at = |h: usize| {
            let quantiles = profile.quantiles(view.last_s.saturating_add(h as u64 * u64::from(view.step_s)))?;
            Some(quantiles.0.map(|value| z(value as f32)))
        };
        let of: Vec<[f32; 4]> = (1..=steps).map(at).collect::<Option<_>>()?;
        let peak = of.iter().fold([f32::MIN; 4], |most, one| std::array::from_fn(|q| most[q].max(one[q])));
        Some(Opinion { steps: of, peak })
    });
    [None, Some(change), season(1, summary.daily), season(7, summary.weekly), Some(histogram), profile]
}
