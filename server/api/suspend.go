package api

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// SuspendSession implements SessionService.
func (s *Sessions) SuspendSession(ctx context.Context, req *cloudcodev1.SuspendSessionRequest) (*cloudcodev1.Session, error) {
	return s.ask(ctx, req.GetName(), req.GetEtag(), (*fleet.Session).Suspend)
}

// ResumeSession implements SessionService.
func (s *Sessions) ResumeSession(ctx context.Context, req *cloudcodev1.ResumeSessionRequest) (*cloudcodev1.Session, error) {
	return s.ask(ctx, req.GetName(), req.GetEtag(), (*fleet.Session).Resume)
}

// ask changes what is wanted of a session. Where that is so already, nothing is
// stored and nobody is told.
func (s *Sessions) ask(ctx context.Context, name, etag string, change func(*fleet.Session, time.Time) error) (*cloudcodev1.Session, error) {
	var v violations
	id := resourceID(&v, "name", "sessions", name)
	if err := v.err(); err != nil {
		return nil, err
	}
	var sess *fleet.Session
	_, err := s.config.Store.Update(ctx, func(tx store.Tx) (err error) {
		sess, err = readSession(tx, id)
		if err != nil {
			return err
		}
		if err := checkEtag(sess, etag); err != nil {
			return err
		}
		if sess.Deleting {
			return deletingError(id)
		}
		before := sess.Clone()
		if err := change(sess, time.Now().UTC()); err != nil {
			if sess.State == fleet.StateLost {
				return grpcerr.New(codes.FailedPrecondition, reasonLost, "%s", err.Error())
			}
			return err
		}
		if sess.UpdateTime.Equal(before.UpdateTime) {
			return nil
		}
		return putWithEvent(tx, sess)
	})
	if err != nil {
		return nil, err
	}
	return s.show(sess), nil
}

func deletingError(id string) error {
	return grpcerr.New(codes.FailedPrecondition, reasonDeleting, "session %q is being deleted: it cannot be changed any more", id)
}
