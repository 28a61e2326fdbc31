//! The S3 operations we serve, on top of `store`. Whatever is not here answers `NotImplemented`.

use std::{collections::BTreeSet, io, ops::Range, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use http::HeaderMap;
use s3s::{
    S3, S3Error, S3Request, S3Response, S3Result,
    dto::{
        CommonPrefix, CreateBucketInput, CreateBucketOutput, DeleteObjectInput, DeleteObjectOutput, DeleteObjectsInput,
        DeleteObjectsOutput, DeletedObject, ETag, ETagCondition, GetBucketLocationInput, GetBucketLocationOutput,
        GetObjectInput, GetObjectOutput, HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput,
        ListBucketsInput, ListBucketsOutput, ListObjectsV2Input, ListObjectsV2Output, Object, PutObjectInput,
        PutObjectOutput, StreamingBlob,
    },
    s3_error,
};

use crate::{
    faults::FaultCell,
    store::{Condition, Meta, Store, WriteError},
};

/// Largest body of a PUT, which is collected in memory.
const PUT_BYTES_MAX: usize = 256 << 20;
/// Most entries of one page of a listing, as on S3.
const PAGE_MAX: usize = 1_000;

#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) store: Arc<Store>,
    pub(crate) faults: Arc<FaultCell>,
}

impl Api {
    fn check_bucket(&self, bucket: &str) -> S3Result<()> {
        if self.store.has_bucket(bucket) { Ok(()) } else { Err(s3_error!(NoSuchBucket)) }
    }

    fn check_writable(&self) -> S3Result<()> {
        if self.faults.get(|f| f.read_only) {
            return Err(s3_error!(AccessDenied, "this server is read-only"));
        }
        Ok(())
    }

    /// The condition of a write, after the faults that touch conditions.
    fn condition(
        &self,
        headers: &HeaderMap,
        if_match: Option<ETagCondition>,
        if_none_match: Option<ETagCondition>,
    ) -> S3Result<Condition> {
        let condition = match (if_match, if_none_match) {
            (None, None) => return Ok(Condition::None),
            (None, Some(ETagCondition::Any)) => Condition::Absent,
            (Some(ETagCondition::Any), None) => Condition::Version(None),
            (Some(ETagCondition::ETag(tag)), None) => Condition::Version(Some(tag.value().to_owned())),
            _ => return Err(s3_error!(NotImplemented, "only If-None-Match: * or one If-Match")),
        };
        let quoted = headers.get(http::header::IF_MATCH).is_some_and(|value| value.as_bytes().starts_with(b"\""));
        if quoted && self.faults.get(|f| f.refuse_quoted_etag) {
            return Err(s3_error!(PreconditionFailed));
        }
        if self.faults.hits(|f| f.conflict) {
            return Err(s3_error!(ConditionalRequestConflict));
        }
        Ok(if self.faults.get(|f| f.ignore_conditions) { Condition::None } else { condition })
    }
}

async fn collect(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let mut bytes = BytesMut::new();
    let Some(mut body) = body else { return Ok(Bytes::new()) };
    while let Some(part) = body.next().await {
        let part = part.map_err(|error| s3_error!(IncompleteBody, "{error}"))?;
        if bytes.len() + part.len() > PUT_BYTES_MAX {
            return Err(s3_error!(EntityTooLarge));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes.freeze())
}

/// The conditions of a read: a client polls a record it knows without fetching it again.
fn check_read(meta: &Meta, if_match: Option<&ETagCondition>, if_none_match: Option<&ETagCondition>) -> S3Result<()> {
    let is = |condition: &ETagCondition| match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(tag) => tag.value() == meta.etag,
    };
    if if_match.is_some_and(|condition| !is(condition)) {
        return Err(s3_error!(PreconditionFailed));
    }
    if if_none_match.is_some_and(is) {
        return Err(s3_error!(NotModified));
    }
    Ok(())
}

fn internal(error: io::Error) -> S3Error {
    tracing::error!(%error, "object store");
    s3_error!(error, InternalError)
}

/// Carries an answer of S3 through the store's read.
struct ReadError(S3Error);

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self(internal(error))
    }
}

fn length(bytes: u64) -> Option<i64> {
    i64::try_from(bytes).ok()
}

/// A body that breaks off in the middle: hyper closes the connection on the error.
fn truncated(bytes: &Bytes) -> StreamingBlob {
    let half = Ok(bytes.slice(..bytes.len() / 2));
    StreamingBlob::wrap(stream::iter([half, Err(io::Error::other("injected fault: truncated"))]))
}

#[async_trait::async_trait]
impl S3 for Api {
    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        self.check_writable()?;
        let bucket = req.input.bucket;
        if self.store.create_bucket(&bucket).map_err(internal)? {
            Ok(S3Response::new(CreateBucketOutput { location: Some(format!("/{bucket}")) }))
        } else {
            Err(s3_error!(BucketAlreadyOwnedByYou))
        }
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.check_bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        req: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.check_bucket(&req.input.bucket)?;
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }

    async fn list_buckets(&self, _req: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        let bucket = |name| s3s::dto::Bucket { name: Some(name), ..Default::default() };
        let buckets = self.store.buckets().into_iter().map(bucket).collect();
        Ok(S3Response::new(ListBucketsOutput { buckets: Some(buckets), ..Default::default() }))
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let S3Request { input, headers, .. } = req;
        self.check_bucket(&input.bucket)?;
        let body = collect(input.body).await?;
        self.check_writable()?;
        let condition = self.condition(&headers, input.if_match, input.if_none_match)?;
        match self.store.put(&input.bucket, &input.key, body, &condition).await {
            Ok(etag) => Ok(S3Response::new(PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() })),
            Err(WriteError::Precondition) => Err(s3_error!(PreconditionFailed)),
            Err(WriteError::Missing) => Err(s3_error!(NoSuchKey)),
            Err(WriteError::Io(error)) => Err(internal(error)),
        }
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        self.check_bucket(&input.bucket)?;
        let pick = |meta: &Meta| -> Result<Range<u64>, ReadError> {
            check_read(meta, input.if_match.as_ref(), input.if_none_match.as_ref()).map_err(ReadError)?;
            match &input.range {
                None => Ok(0..meta.size_bytes),
                Some(range) => range.check(meta.size_bytes).map_err(|error| ReadError(error.into())),
            }
        };
        let read = self.store.read(&input.bucket, &input.key, pick).await.map_err(|ReadError(error)| error)?;
        let Some((meta, range, bytes)) = read else { return Err(s3_error!(NoSuchKey)) };
        let content_range =
            input.range.map(|_| format!("bytes {}-{}/{}", range.start, range.end.saturating_sub(1), meta.size_bytes));
        let content_length = length(bytes.len() as u64);
        let body = if self.faults.hits(|f| f.truncate) {
            truncated(&bytes)
        } else {
            StreamingBlob::from(s3s::Body::from(bytes))
        };
        Ok(S3Response::new(GetObjectOutput {
            body: Some(body),
            accept_ranges: Some("bytes".to_owned()),
            content_length,
            content_range,
            e_tag: Some(ETag::Strong(meta.etag)),
            last_modified: Some(meta.modified.into()),
            ..Default::default()
        }))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = req.input;
        self.check_bucket(&input.bucket)?;
        let Some(meta) = self.store.meta(&input.bucket, &input.key) else { return Err(s3_error!(NoSuchKey)) };
        check_read(&meta, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        Ok(S3Response::new(HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: length(meta.size_bytes),
            e_tag: Some(ETag::Strong(meta.etag)),
            last_modified: Some(meta.modified.into()),
            ..Default::default()
        }))
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.check_bucket(&req.input.bucket)?;
        self.check_writable()?;
        self.store.delete(&req.input.bucket, &req.input.key).await.map_err(internal)?;
        Ok(S3Response::with_status(DeleteObjectOutput::default(), http::StatusCode::NO_CONTENT))
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let DeleteObjectsInput { bucket, delete, .. } = req.input;
        self.check_bucket(&bucket)?;
        self.check_writable()?;
        if delete.objects.len() > PAGE_MAX {
            return Err(s3_error!(MalformedXML, "more than {PAGE_MAX} keys"));
        }
        let mut deleted = Vec::with_capacity(delete.objects.len());
        for object in delete.objects {
            self.store.delete(&bucket, &object.key).await.map_err(internal)?;
            deleted.push(DeletedObject { key: Some(object.key), ..Default::default() });
        }
        let deleted = (!delete.quiet.unwrap_or(false)).then_some(deleted);
        Ok(S3Response::new(DeleteObjectsOutput { deleted, ..Default::default() }))
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        self.check_bucket(&input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone().filter(|delimiter| !delimiter.is_empty());
        let wanted = input.max_keys.map_or(PAGE_MAX, |max| usize::try_from(max).unwrap_or(0).min(PAGE_MAX));
        let after = input.continuation_token.clone().or_else(|| input.start_after.clone()).unwrap_or_default();
        let page = self.page(&input.bucket, &prefix, delimiter.as_deref(), after, wanted);
        let folders = page.folders.into_iter().map(|prefix| CommonPrefix { prefix: Some(prefix) }).collect::<Vec<_>>();
        let contents: Vec<Object> = page.objects.into_iter().map(|(key, meta)| object(key, meta)).collect();
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            key_count: i32::try_from(contents.len() + folders.len()).ok(),
            max_keys: i32::try_from(wanted).ok(),
            is_truncated: Some(page.next.is_some()),
            next_continuation_token: page.next,
            contents: Some(contents),
            common_prefixes: Some(folders),
            prefix: input.prefix,
            delimiter: input.delimiter,
            continuation_token: input.continuation_token,
            start_after: input.start_after,
            ..Default::default()
        }))
    }
}

fn object(key: String, meta: Meta) -> Object {
    Object {
        key: Some(key),
        e_tag: Some(ETag::Strong(meta.etag)),
        last_modified: Some(meta.modified.into()),
        size: length(meta.size_bytes),
        ..Default::default()
    }
}

/// One page of a listing. `next` is the last key looked at, if there may be more.
struct Page {
    objects: Vec<(String, Meta)>,
    folders: BTreeSet<String>,
    next: Option<String>,
}

impl Api {
    fn page(&self, bucket: &str, prefix: &str, delimiter: Option<&str>, mut after: String, wanted: usize) -> Page {
        let mut page = Page { objects: Vec::new(), folders: BTreeSet::new(), next: None };
        loop {
            let found = self.store.list(bucket, prefix, &after, PAGE_MAX + 1);
            if found.is_empty() {
                return page;
            }
            for (key, meta) in found {
                let folder = delimiter.and_then(|delimiter| {
                    let end = key[prefix.len()..].find(delimiter)? + prefix.len() + delimiter.len();
                    Some(key[..end].to_owned())
                });
                let known = folder.as_ref().is_some_and(|folder| page.folders.contains(folder));
                // A folder that a page before this one showed: its keys come after the token, which lies inside it.
                let shown = folder.as_ref().is_some_and(|folder| page.folders.is_empty() && after.starts_with(folder));
                if !known && !shown && page.objects.len() + page.folders.len() == wanted {
                    page.next = Some(after);
                    return page;
                }
                after.clone_from(&key);
                match folder {
                    None => page.objects.push((key, meta)),
                    Some(_) if shown => {}
                    Some(folder) => drop(page.folders.insert(folder)),
                }
            }
        }
    }
}
