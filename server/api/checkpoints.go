package api

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/storage"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// CheckpointSession implements SessionService.
func (s *Sessions) CheckpointSession(ctx context.Context, req *cloudcodev1.CheckpointSessionRequest) (*cloudcodev1.Checkpoint, error) {
	sess, err := s.get(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	return s.saveNow(ctx, sess, "manual")
}

// saveNow has the session's node save it.
func (s *Sessions) saveNow(ctx context.Context, sess *fleet.Session, trigger string) (*cloudcodev1.Checkpoint, error) {
	if !sess.Spec.Storage.Remote() {
		return nil, grpcerr.New(codes.FailedPrecondition, storage.ReasonLocal, "session %q is kept on the disk of its node alone (storage mode LOCAL): there is nowhere to save it to", sess.ID)
	}
	if sess.Assignment == nil || sess.State == fleet.StateSuspended {
		return nil, grpcerr.New(codes.FailedPrecondition, reasonNotRunning, "session %q is %s and does not run: what it had is saved; resume it first", sess.ID, sess.State)
	}
	agent, node, err := s.agent(ctx, sess)
	if err != nil {
		return nil, err
	}
	resp, err := agent.Checkpoint(ctx, &nodev1.CheckpointRequest{SessionId: sess.ID, Trigger: trigger})
	if err != nil {
		return nil, nodeError(sess.ID, node, err)
	}
	return saved(resp.GetCheckpoint(), node), nil
}

const (
	maxSaid  = 4 << 10 // of a text
	maxNotes = 100
)

// saved is a checkpoint as a node tells of it, of which users are shown what there
// is a field for, and so much of it.
func saved(told *cloudcodev1.Checkpoint, node string) *cloudcodev1.Checkpoint {
	c := protoconv.CheckpointFromProto(told)
	if c == nil {
		return nil
	}
	c.ID, c.Trigger, c.OpenCodeVersion, c.Node = clip(c.ID), clip(c.Trigger), clip(c.OpenCodeVersion), node
	c.Notes = c.Notes[:min(len(c.Notes), maxNotes)]
	for i, n := range c.Notes {
		c.Notes[i] = clip(n)
	}
	return protoconv.Checkpoint(c)
}

func clip(s string) string {
	if len(s) <= maxSaid {
		return s
	}
	return strings.ToValidUTF8(s[:maxSaid], "") + "…"
}

// nodeError passes on what a node says, with the node's name.
func nodeError(id, node string, err error) error {
	st := status.Convert(err)
	reason := grpcerr.Reason(err)
	switch st.Code() {
	case codes.Canceled, codes.DeadlineExceeded:
		return st.Err()
	case codes.Unavailable:
		if reason == "" {
			return grpcerr.New(codes.Unavailable, reasonUnreachable, "node %s, which has session %q, cannot be reached: %s", node, id, st.Message())
		}
	case codes.NotFound:
		if reason == "" || reason == "SESSION_NOT_HERE" {
			return grpcerr.New(codes.FailedPrecondition, reasonNoLogs, "session %q has not been started on node %s yet: try again", id, node)
		}
	}
	if reason == "" {
		reason = "NODE_ERROR"
	}
	return grpcerr.New(st.Code(), reason, "node %s: %s", node, st.Message())
}

// ListCheckpoints implements SessionService.
func (s *Sessions) ListCheckpoints(ctx context.Context, req *cloudcodev1.ListCheckpointsRequest) (*cloudcodev1.ListCheckpointsResponse, error) {
	var v violations
	id := resourceID(&v, "parent", "sessions", req.GetParent())
	limit, after := page(&v, "checkpoints", id, req.GetPageSize(), req.GetPageToken())
	if err := v.err(); err != nil {
		return nil, err
	}
	sess, err := s.get(ctx, req.GetParent())
	if err != nil {
		return nil, err
	}
	stored, err := s.config.Storage.Session(sess.Spec.Storage)
	if err != nil {
		return nil, err
	}
	all, err := stored.List(ctx)
	if err != nil {
		return nil, err
	}
	resp := &cloudcodev1.ListCheckpointsResponse{}
	size := 0
	for _, c := range all {
		if after != "" && c.ID >= after { // the newest is first
			continue
		}
		shown := protoconv.Checkpoint(c)
		size += proto.Size(shown)
		if n := len(resp.Checkpoints); n == limit || (n > 0 && size > maxPageBytes) {
			resp.NextPageToken = nextPage("checkpoints", id, resp.Checkpoints[n-1].GetId())
			break
		}
		resp.Checkpoints = append(resp.Checkpoints, shown)
	}
	return resp, nil
}

// wholeTree returns FAILED_PRECONDITION for a session whose checkpoints are not
// all of it.
func wholeTree(sess *fleet.Session, done string) error {
	if sess.Spec.Storage.Mode != fleet.ModeMount {
		return nil
	}
	return grpcerr.New(codes.FailedPrecondition, reasonMount, "session %q is on the bucket itself (storage mode MOUNT): its checkpoints hold OpenCode's data and not the files, so it cannot be %s. Copy its folder %s with a tool for S3, or use mode SNAPSHOT for new sessions", sess.ID, done, sess.Spec.Storage.URI())
}

// RestoreSession implements SessionService.
func (s *Sessions) RestoreSession(ctx context.Context, req *cloudcodev1.RestoreSessionRequest) (*cloudcodev1.Session, error) {
	var v violations
	if req.GetCheckpoint() == "" {
		v.add("checkpoint", "is missing: `cloudcode session checkpoints` lists those that there are")
	}
	id := resourceID(&v, "name", "sessions", req.GetName())
	if err := v.err(); err != nil {
		return nil, err
	}
	sess, err := s.get(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	if err := checkEtag(sess, req.GetEtag()); err != nil {
		return nil, err
	}
	if sess.Deleting {
		return nil, deletingError(id)
	}
	if err := wholeTree(sess, "taken back"); err != nil {
		return nil, err
	}
	stored, err := s.config.Storage.Session(sess.Spec.Storage)
	if err != nil {
		return nil, err
	}
	c, err := stored.Find(ctx, req.GetCheckpoint())
	if err != nil {
		return nil, err
	}
	return s.ask(ctx, req.GetName(), req.GetEtag(), func(sess *fleet.Session, now time.Time) error { return sess.Restore(c.ID, now) })
}

// ForkSession implements SessionService.
func (s *Sessions) ForkSession(ctx context.Context, req *cloudcodev1.ForkSessionRequest) (*cloudcodev1.Session, error) {
	var v violations
	resourceID(&v, "name", "sessions", req.GetName())
	if req.GetSessionId() != "" {
		validateID(&v, req.GetSessionId())
	}
	validateRequestID(&v, req.GetRequestId())
	if err := v.err(); err != nil {
		return nil, err
	}
	bare := proto.CloneOf(req)
	bare.RequestId = ""
	digest, err := digestOf("fork\x00", bare)
	if err != nil {
		return nil, err
	}
	key := requestKey(req.GetRequestId())
	if earlier, err := s.earlier(ctx, key, digest); err != nil || earlier != nil {
		return s.showOr(earlier, err)
	}
	source, err := s.get(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	if err := wholeTree(source, "forked"); err != nil {
		return nil, err
	}
	from, err := s.config.Storage.Session(source.Spec.Storage)
	if err != nil {
		return nil, err
	}
	id, err := s.chooseID(ctx, req.GetSessionId())
	if err != nil {
		return nil, err
	}
	spec := source.Spec.Clone()
	spec.Storage.Prefix = id
	made := newSession(id, protoconv.Map(source.Labels), spec)
	made.OpenCodeVersion = source.OpenCodeVersion
	// Once more in the transaction that stores it; here so that nothing is written in vain.
	if err := s.config.Store.View(ctx, func(tx store.ReadTx) error { return storage.InUse(tx, spec.Storage) }); err != nil {
		return nil, err
	}
	checkpoint, err := s.forkPoint(ctx, source, from, req.GetCheckpoint())
	if err != nil {
		return nil, err
	}
	to := from.Sibling(id)
	if err := to.Copy(ctx, from, checkpoint, made); err != nil {
		// An equal request at the same time may have been first.
		if earlier, _ := s.earlier(ctx, key, digest); earlier != nil {
			return s.show(earlier), nil
		}
		return nil, err
	}
	got, err := s.insert(ctx, made, key, digest)
	if err != nil || got.UID != made.UID {
		if err := to.Discard(context.WithoutCancel(ctx), made); err != nil {
			s.config.Log.ErrorContext(ctx, "a fork that was not made is left in object storage", "session", id, "storage", spec.Storage.URI(), "error", err)
		}
	}
	return s.showOr(got, err)
}

// forkPoint returns the checkpoint that a fork begins with: the one asked for, or
// the session as it is now.
func (s *Sessions) forkPoint(ctx context.Context, source *fleet.Session, from *storage.Session, asked string) (string, error) {
	if asked == "" && source.State == fleet.StateRunning {
		c, err := s.saveNow(ctx, source, "fork")
		if err != nil {
			return "", fmt.Errorf("save session %s before it is forked: %w", source.ID, err)
		}
		return c.GetId(), nil
	}
	c, err := from.Find(ctx, asked)
	if err != nil {
		return "", err
	}
	return c.ID, nil
}
