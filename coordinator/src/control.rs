//! What the edge asks: whose token, and where a sprite is.

use proto::{
    control::{AuthenticateReply, AuthenticateRequest, ResolveReply, ResolveRequest, control_server::Control},
    paths::DEFAULT_HTTP_PORT,
    record::UrlAuth,
};
use tonic::{Request, Response, Status};

use crate::{refusal::Refusal, service::Service};

/// Serves the edge. It trusts its caller: nobody else reaches our socket, and the edge lets nobody outside call this.
#[derive(Clone, Debug)]
pub(crate) struct ControlService {
    pub(crate) service: Service,
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn authenticate(&self, request: Request<AuthenticateRequest>) -> Result<Response<AuthenticateReply>, Status> {
        let caller = self.service.authenticate(Some(&request.get_ref().token)).await?;
        Ok(Response::new(AuthenticateReply { org: caller.org.to_string(), token_id: caller.token_id.to_string() }))
    }

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<ResolveReply>, Status> {
        let request = request.into_inner();
        let (org, name) = match request.label.as_str() {
            "" => (request.org, request.name),
            label => match self.service.label(label).await? {
                Some((org, name)) => (org, name.to_string()),
                None => return Err(Refusal::NotFound { name: label.to_owned() }.into()),
            },
        };
        let (view, was) = if request.wake {
            let (view, reply) = self.service.wake(&org, &name).await?;
            (view, reply.was)
        } else {
            let view = self.service.get(&org, &name).await?;
            let state = view.status.as_ref().map(|status| status.state.clone());
            (view, state.unwrap_or_default())
        };
        let record = &view.record;
        Ok(Response::new(ResolveReply {
            sprite_id: record.id.to_string(),
            name: record.name.to_string(),
            org: record.org.clone(),
            // The only host there is; it wakes what it owns, and takes up what nobody does.
            node: self.service.node().address(),
            public: record.url_settings.auth == UrlAuth::Public,
            was,
            http_port: u32::from(DEFAULT_HTTP_PORT),
        }))
    }
}
