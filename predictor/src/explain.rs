//! Why a page is or is not proposed: plain data, made by
//! [`AccessPredictor::explain`](crate::AccessPredictor::explain).

use crate::access::Expert;

/// One expert's opinion of a page at this moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Vote {
    pub expert: Expert,
    /// Whose accesses lead to it, as in [`Access::vm`](crate::Access::vm), where one VM alone does.
    pub vm: Option<u64>,
    /// The expert's own score, 0 ..= 1.
    pub raw: f32,
    /// Probability by the record of such predictions, 0 ..= 1.
    pub calibrated: f32,
    /// Share in the mixed score, 0 ..= 1; `None` where the expert decides alone.
    pub weight: Option<f32>,
    /// When the page is expected to be read, where the expert knows.
    pub due_us: Option<u64>,
}

/// What is or would be done about a page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Likely enough; handed out with the next access that leads to it.
    Propose,
    /// A guest touched it lately: there is nothing to fetch.
    Touched,
    /// Handed out lately at this probability; not again unless it becomes likelier or was lost.
    Proposed { probability: f32 },
    /// The likeliest vote is below the floor.
    Unlikely,
    /// Likely enough for the operator, but not for the governor at this moment: see [`Spending`].
    Withheld,
    /// No expert names it.
    Unforeseen,
}

/// What the governor lets the experts spend at this moment. Learned sets do not ask it: they shrink their own window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spending {
    /// Candidates less likely than this are not handed out; `None`: none is.
    pub floor: Option<f32>,
    /// Pages that may still be handed out and turn out in vain; below zero: what was handed out last went beyond.
    pub budget_pages: f32,
    /// The most that it can grow to.
    pub most_pages: f32,
}

/// What is known of a page.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    pub page: u64,
    /// Likeliest first.
    pub votes: Vec<Vote>,
    /// Probability of the votes together; `None` without one.
    pub probability: Option<f32>,
    /// Candidates less likely than this are not handed out.
    pub floor: f32,
    /// Where the governor's floor is now, at or above `floor`.
    pub spending: Spending,
    pub decision: Decision,
    /// Last activity in the page's block (a touch or a proposal), to a tenth of a second; `None` if none is remembered.
    pub active_us: Option<u64>,
}
