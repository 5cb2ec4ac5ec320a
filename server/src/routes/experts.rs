//! `/v1/moe/experts` and `/v1/moe/profile`: the load of every expert, to read and to start from again.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse as _, Response};
use engine::{EngineHandle, ExpertProfile, LayerLoads, LoadSums, MAX_LOAD_WINDOW};

use super::bad_query;
use crate::app::App;
use crate::error::ApiError;
use crate::openai::error::ErrorResponse;
use crate::openai::expert_loads::{self, ExpertLoadMatrix, ExpertLoadQuery, LayerLoad, LoadFormat, ProfileQuery};

/// The load of every expert of every layer
#[utoipa::path(
    get,
    path = "/v1/moe/experts",
    tag = "experts",
    params(ExpertLoadQuery),
    responses(
        (status = 200, content((ExpertLoadMatrix = "application/json"), (String = "text/csv"))),
        (status = "4XX", description = "The query is at fault", body = ErrorResponse),
        (status = 503, description = "The model is being loaded", body = ErrorResponse),
    )
)]
pub async fn loads(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    query: Result<Query<ExpertLoadQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let engine = app.model()?.engine.clone();
    let Query(query) = query.map_err(|rejection| bad_query(&rejection))?;
    let window = window(query.window)?;
    let wants_csv = match query.format {
        Some(format) => format == LoadFormat::Csv,
        None => prefers_csv(&headers),
    };
    let (model, asked) = (app.model_names[0].clone(), query.window);
    let job = move || {
        let sums = sums(&engine, window);
        Ok(match wants_csv {
            true => ([(header::CONTENT_TYPE, "text/csv; charset=utf-8")], csv(&sums)).into_response(),
            false => Json(matrix(model, asked, sums)).into_response(),
        })
    };
    app.limits.run_text(job).await
}

/// What live traffic used of each expert, as a profile that `moesaic profile` could have written
#[utoipa::path(
    post,
    path = "/v1/moe/profile",
    tag = "experts",
    params(ProfileQuery),
    responses(
        (status = 200, body = expert_loads::ExpertProfile),
        (status = "4XX", description = "No admin key, a wrong one, or nothing was routed", body = ErrorResponse),
        (status = 503, description = "The model is being loaded", body = ErrorResponse),
    )
)]
pub async fn profile(
    State(app): State<Arc<App>>,
    query: Result<Query<ProfileQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let engine = app.model()?.engine.clone();
    let Query(query) = query.map_err(|rejection| bad_query(&rejection))?;
    let window = window(query.window)?;
    let model = app.model_names[0].clone();
    let job = move || {
        let sums = sums(&engine, window);
        if sums.layers.iter().all(|layer| layer.num_tokens == 0) {
            return Err(ApiError::invalid("window", "no token was routed in this time: there is no profile to write"));
        }
        Ok(ExpertProfile::new((&model, engine.fingerprint().sampled_weights()), &sums).to_json())
    };
    let json = app.limits.run_text(job).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}

fn window(seconds: Option<u32>) -> Result<Option<Duration>, ApiError> {
    let most = MAX_LOAD_WINDOW.as_secs();
    match seconds {
        Some(seconds) if seconds == 0 || u64::from(seconds) > most => {
            Err(ApiError::invalid("window", format!("is {seconds} seconds, allowed are 1 to {most}")))
        }
        seconds => Ok(seconds.map(|seconds| Duration::from_secs(seconds.into()))),
    }
}

fn sums(engine: &EngineHandle, window: Option<Duration>) -> LoadSums {
    let loads = engine.expert_loads();
    window.map_or_else(|| loads.since_start(), |window| loads.over(window))
}

/// The first type that is known counts.
fn prefers_csv(headers: &HeaderMap) -> bool {
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kinds = accepted.split(',').map(|kind| kind.split(';').next().unwrap_or_default().trim());
    kinds.into_iter().find(|kind| ["text/csv", "application/json"].contains(kind)) == Some("text/csv")
}

fn matrix(model: String, window: Option<u32>, sums: LoadSums) -> ExpertLoadMatrix {
    let layer = |(layer, sums): (usize, LayerLoads)| LayerLoad {
        layer,
        num_experts: sums.loads.len(),
        top_k: sums.top_k,
        num_tokens: sums.num_tokens,
        imbalance: sums.imbalance(),
        gini: sums.gini(),
        entropy: sums.entropy_bits(),
        utilization: sums.utilization(),
        shares: shares(&sums),
        loads: sums.loads,
    };
    let layers = sums.layers.into_iter().enumerate().map(layer).collect();
    ExpertLoadMatrix { object: "moe.experts", model, window, seconds: sums.seconds, layers }
}

fn shares(layer: &LayerLoads) -> Vec<f64> {
    let total = layer.total().max(1) as f64;
    layer.loads.iter().map(|&load| load as f64 / total).collect()
}

/// A line for each expert.
fn csv(sums: &LoadSums) -> String {
    let mut text = String::from("layer,expert,load,share\n");
    for (layer, sums) in sums.layers.iter().enumerate() {
        for (expert, (load, share)) in sums.loads.iter().zip(shares(sums)).enumerate() {
            writeln!(text, "{layer},{expert},{load},{share}").expect("writing to a string cannot fail");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_is_for_those_who_ask_for_it_first() {
        let check = |accept: &str, expected: bool| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            assert_eq!(prefers_csv(&headers), expected, "{accept}");
        };
        check("text/csv", true);
        check("text/plain, text/csv;q=0.9, application/json", true);
        check("application/json, text/csv", false);
        check("*/*", false);
        assert!(!prefers_csv(&HeaderMap::new()));
    }

    #[test]
    fn every_expert_has_a_line() {
        let layer = |loads: &[u64]| LayerLoads {
            top_k: 1,
            num_tokens: loads.iter().sum(),
            loads: loads.into(),
            num_places: 0,
            num_dropped: 0,
        };
        let sums = LoadSums { seconds: 2.5, layers: vec![layer(&[3, 1]), layer(&[0])], num_mtp: 0 };
        assert_eq!(csv(&sums), "layer,expert,load,share\n0,0,3,0.75\n0,1,1,0.25\n1,0,0,0\n");
        let matrix = serde_json::to_value(matrix("m".into(), Some(60), sums)).unwrap();
        assert_eq!((&matrix["window"], &matrix["seconds"]), (&serde_json::json!(60), &serde_json::json!(2.5)));
        assert_eq!(matrix["layers"][0]["shares"], serde_json::json!([0.75, 0.25]));
        assert_eq!((matrix["layers"][1]["layer"].as_u64(), matrix["layers"][1]["gini"].as_f64()), (Some(1), None));
    }
}
