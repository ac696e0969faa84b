package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/storage"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

func (s *Sessions) show(sess *fleet.Session) *cloudcodev1.Session {
	return protoconv.Session(sess, s.config.WebURI(sess.ID))
}

// CreateSession implements SessionService.
func (s *Sessions) CreateSession(ctx context.Context, req *cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
	spec := protoconv.SpecFromProto(req.GetSession().GetSpec())
	if spec.Image == "" {
		// Stored with the session: a new default must not change what runs.
		spec.Image = s.config.DefaultImage
	}
	var v violations
	if req.GetSessionId() != "" {
		validateID(&v, req.GetSessionId())
	}
	validateRequestID(&v, req.GetRequestId())
	validateLabels(&v, "session.labels", req.GetSession().GetLabels())
	validateSpec(&v, spec)
	validateStorage(&v, req.GetSession().GetSpec().GetStorage())
	if err := v.err(); err != nil {
		return nil, err
	}
	digest, err := fingerprint(req)
	if err != nil {
		return nil, err
	}

	key := requestKey(req.GetRequestId())
	if earlier, err := s.earlier(ctx, key, digest); err != nil || earlier != nil {
		return s.showOr(earlier, err)
	}
	id, err := s.chooseID(ctx, req.GetSessionId())
	if err != nil {
		return nil, err
	}
	// Before the transaction: it asks the object storage, which takes its time.
	resolved, err := s.config.Storage.Resolve(ctx, id, protoconv.StorageRequestFromProto(req.GetSession().GetSpec().GetStorage()))
	if err != nil {
		return nil, err
	}
	spec.Storage = resolved.Storage
	sess := newSession(id, protoconv.Map(req.GetSession().GetLabels()), spec)
	// Who had the folder before is fenced by the first assignment.
	sess.Generation = resolved.Generation
	return s.showOr(s.insert(ctx, sess, key, digest))
}

func (s *Sessions) showOr(sess *fleet.Session, err error) (*cloudcodev1.Session, error) {
	if err != nil {
		return nil, err
	}
	return s.show(sess), nil
}

func newSession(id string, labels map[string]string, spec fleet.Spec) *fleet.Session {
	now := time.Now().UTC()
	return &fleet.Session{
		ID: id, UID: uuid.NewString(), CreateTime: now, UpdateTime: now, Labels: labels, Spec: spec,
		State: fleet.StatePending, Message: "A node is being chosen.",
	}
}

// insert stores a new session, and returns it or the one that an equal request
// has made meanwhile.
func (s *Sessions) insert(ctx context.Context, sess *fleet.Session, key, digest string) (made *fleet.Session, err error) {
	_, err = s.config.Store.Update(ctx, func(tx store.Tx) error {
		made = nil
		if key != "" {
			earlier, err := answered(tx, key, digest)
			if err != nil || earlier != nil {
				made = earlier
				return err
			}
		}
		if _, err := freeID(tx, sess.ID); err != nil {
			return err
		}
		if err := storage.InUse(tx, sess.Spec.Storage); err != nil {
			return err
		}
		made = sess.Clone()
		if err := putWithEvent(tx, made); err != nil {
			return err
		}
		if key == "" {
			return nil
		}
		return tx.PutRequest(key, store.Request{Fingerprint: digest, SessionID: made.ID, SessionUID: made.UID, UnixSeconds: made.CreateTime.Unix()})
	})
	return made, err
}

// earlier returns the session that an earlier request with this key has made; nil
// if there was none, or there is no key.
func (s *Sessions) earlier(ctx context.Context, key, digest string) (sess *fleet.Session, err error) {
	if key == "" {
		return nil, nil
	}
	err = s.config.Store.View(ctx, func(tx store.ReadTx) error {
		sess, err = answered(tx, key, digest)
		return err
	})
	return sess, err
}

// chooseID returns the id asked for, if it is free, or a new one. Only the
// transaction that stores the session says for sure.
func (s *Sessions) chooseID(ctx context.Context, asked string) (id string, err error) {
	err = s.config.Store.View(ctx, func(tx store.ReadTx) error {
		id, err = freeID(tx, asked)
		return err
	})
	return id, err
}

// fingerprint tells equal requests from different ones.
func fingerprint(req *cloudcodev1.CreateSessionRequest) (string, error) {
	bare := proto.CloneOf(req)
	bare.RequestId = ""
	return digestOf("", bare)
}

// digestOf has a kind, so that requests of different methods are different.
func digestOf(kind string, m proto.Message) (string, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append([]byte(kind), data...))
	return hex.EncodeToString(sum[:]), nil
}

// answered returns the session that an earlier request with this key has made,
// nil if there was none.
func answered(tx store.ReadTx, key, digest string) (*fleet.Session, error) {
	r, err := tx.Request(key)
	if errors.Is(err, fleet.ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if r.Fingerprint != digest {
		return nil, grpcerr.New(codes.InvalidArgument, reasonRequestReused, "request_id was used for a different request before: use a new one for a new session")
	}
	sess, err := tx.Session(r.SessionID)
	if errors.Is(err, fleet.ErrNotFound) || (err == nil && sess.UID != r.SessionUID) {
		return nil, grpcerr.New(codes.AlreadyExists, reasonRequestSpent, "this request has made session %q, which was deleted since: use a new request_id for a new session", r.SessionID)
	}
	return sess, err
}

// freeID returns the id asked for, or a new one.
func freeID(tx store.ReadTx, id string) (string, error) {
	if id != "" {
		sess, err := tx.Session(id)
		switch {
		case errors.Is(err, fleet.ErrNotFound):
			return id, nil
		case err != nil:
			return "", err
		case sess.Deleting:
			return "", grpcerr.New(codes.AlreadyExists, reasonSessionExists, "session %q is still being deleted: try again when it is gone, or choose another id", id)
		}
		return "", grpcerr.New(codes.AlreadyExists, reasonSessionExists, "there is a session %q already: choose another id, or leave it out to get a new one", id)
	}
	for range 20 {
		id = newID()
		if _, err := tx.Session(id); errors.Is(err, fleet.ErrNotFound) {
			return id, nil
		} else if err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("%w: no free id was found: name one", fleet.ErrUnavailable)
}

func putWithEvent(tx store.Tx, sess *fleet.Session) error {
	if err := tx.PutSession(sess); err != nil {
		return err
	}
	_, err := tx.AppendEvent(sess)
	return err
}

func readSession(tx store.ReadTx, id string) (*fleet.Session, error) {
	sess, err := tx.Session(id)
	if errors.Is(err, fleet.ErrNotFound) {
		return nil, sessionNotFound(id)
	}
	return sess, err
}

func (s *Sessions) get(ctx context.Context, name string) (*fleet.Session, error) {
	var v violations
	id := resourceID(&v, "name", "sessions", name)
	if err := v.err(); err != nil {
		return nil, err
	}
	var sess *fleet.Session
	err := s.config.Store.View(ctx, func(tx store.ReadTx) (err error) {
		sess, err = readSession(tx, id)
		return err
	})
	if err != nil {
		return nil, err
	}
	return sess, nil
}

// GetSession implements SessionService.
func (s *Sessions) GetSession(ctx context.Context, req *cloudcodev1.GetSessionRequest) (*cloudcodev1.Session, error) {
	sess, err := s.get(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	return s.show(sess), nil
}

// ListSessions implements SessionService.
func (s *Sessions) ListSessions(ctx context.Context, req *cloudcodev1.ListSessionsRequest) (*cloudcodev1.ListSessionsResponse, error) {
	var v violations
	limit, after := page(&v, "sessions", req.GetFilter(), req.GetPageSize(), req.GetPageToken())
	meant, err := parseFilter(req.GetFilter())
	if err != nil {
		v.add("filter", err.Error())
	}
	if err := v.err(); err != nil {
		return nil, err
	}
	resp := &cloudcodev1.ListSessionsResponse{}
	err = s.config.Store.View(ctx, func(tx store.ReadTx) error {
		last, size := "", 0
		for sess, err := range tx.Sessions(after) {
			if err != nil {
				return err
			}
			if !meant(sess) {
				continue
			}
			shown := s.show(sess)
			size += proto.Size(shown)
			if n := len(resp.Sessions); n == limit || (n > 0 && size > maxPageBytes) {
				resp.NextPageToken = nextPage("sessions", req.GetFilter(), last)
				return nil
			}
			resp.Sessions = append(resp.Sessions, shown)
			last = sess.ID
		}
		return ctx.Err()
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func checkEtag(sess *fleet.Session, etag string) error {
	if etag == "" || etag == protoconv.Etag(sess) {
		return nil
	}
	return grpcerr.New(codes.Aborted, reasonEtag, "session %q has changed since it was read: read it again, then repeat the change with the new etag", sess.ID)
}

// DeleteSession implements SessionService.
func (s *Sessions) DeleteSession(ctx context.Context, req *cloudcodev1.DeleteSessionRequest) (*cloudcodev1.Session, error) {
	var v violations
	id := resourceID(&v, "name", "sessions", req.GetName())
	if err := v.err(); err != nil {
		return nil, err
	}
	var sess *fleet.Session
	_, err := s.config.Store.Update(ctx, func(tx store.Tx) (err error) {
		sess, err = readSession(tx, id)
		if err != nil {
			return err
		}
		if sess.Deleting && sess.Purge == req.GetPurgeStorage() {
			if sess.GiveUp(time.Now().UTC()) {
				return putWithEvent(tx, sess)
			}
			return nil // a retry, whatever its etag
		}
		if sess.StorageSettled && req.GetPurgeStorage() {
			return grpcerr.New(codes.FailedPrecondition, reasonDeleting, "session %q is deleted, and its object storage was kept: recover it from there to purge that", id)
		}
		if !sess.Deleting {
			if err := checkEtag(sess, req.GetEtag()); err != nil {
				return err
			}
		}
		// A purge that cannot be done can be taken back by deleting once more without.
		sess.Deleting, sess.Purge = true, req.GetPurgeStorage()
		sess.UpdateTime = time.Now().UTC()
		if err := sess.SetState(fleet.StateDeleting, "", ""); err != nil {
			return err
		}
		return putWithEvent(tx, sess)
	})
	if req.GetAllowMissing() && grpcerr.Reason(err) == reasonSessionNotFound {
		return &cloudcodev1.Session{Name: protoconv.SessionName(id), State: cloudcodev1.Session_DELETING}, nil
	}
	if err != nil {
		return nil, err
	}
	return s.show(sess), nil
}

// requestKey is a request id as it is stored: a UUID is the same in either case.
func requestKey(id string) string { return strings.ToLower(id) }
