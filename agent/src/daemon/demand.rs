//! The API's questions and orders about demand.

use super::control::Handle;
use prestage_integration::api::demand::{
    AdviceList, DecisionList, DecisionsQuery, DemandControl, DemandStatus, Event, EventList, EventRequest, Execution,
    ExecutionList, ExecutionStart, Forecast, ForecastQuery, Reservation, ReservationList, ReservationRequest, VmPolicy,
    VmPolicyShown, WebhookList,
};
use prestage_integration::api::{ApiError, ErrorCode, Reply};

fn off<'a, T: Send + 'a>() -> Reply<'a, T> {
    Box::pin(async { Err(ApiError::new(ErrorCode::Unavailable, "demand is not measured: set demand.enabled = true")) })
}

impl DemandControl for Handle {
    fn demand(&self) -> Reply<'_, DemandStatus> {
        off()
    }
    fn policy(&self, _vm: String) -> Reply<'_, VmPolicyShown> {
        off()
    }
    fn policy_set(&self, _vm: String, _policy: VmPolicy) -> Reply<'_, VmPolicyShown> {
        off()
    }
    fn policy_remove(&self, _vm: String) -> Reply<'_, ()> {
        off()
    }
    fn forecast(&self, _vm: String, _query: ForecastQuery) -> Reply<'_, Forecast> {
        off()
    }
    fn recommendations(&self, _vm: Option<String>) -> Reply<'_, AdviceList> {
        off()
    }
    fn decisions(&self, _query: DecisionsQuery) -> Reply<'_, DecisionList> {
        off()
    }
    fn reservations(&self) -> Reply<'_, ReservationList> {
        off()
    }
    fn reservation_add(&self, _request: ReservationRequest) -> Reply<'_, Reservation> {
        off()
    }
    fn reservation_cancel(&self, _id: i64) -> Reply<'_, ()> {
        off()
    }
    fn executions(&self) -> Reply<'_, ExecutionList> {
        off()
    }
    fn execution_start(&self, _request: ExecutionStart) -> Reply<'_, Execution> {
        off()
    }
    fn execution_end(&self, _id: i64) -> Reply<'_, Execution> {
        off()
    }
    fn events(&self) -> Reply<'_, EventList> {
        off()
    }
    fn event_add(&self, _request: EventRequest) -> Reply<'_, Event> {
        off()
    }
    fn event_remove(&self, _id: i64) -> Reply<'_, ()> {
        off()
    }
    fn webhooks(&self) -> Reply<'_, WebhookList> {
        off()
    }
}
