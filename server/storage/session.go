package storage

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
)

// askBound is for what somebody waits for, but the content of files.
const askBound = 30 * time.Second

// Session is one session's checkpoints.
type Session struct {
	config conf.Config
	bucket *bucket
	inner  *checkpoint.Session
	prefix string
}

// List returns all checkpoints, the newest first.
func (s *Session) List(ctx context.Context) ([]*fleet.Checkpoint, error) {
	ctx, cancel := bound(ctx, askBound)
	defer cancel()
	infos, err := s.inner.List(ctx)
	if err != nil && !errors.Is(err, checkpoint.ErrNotFound) {
		return nil, explain(ctx, s.config, err)
	}
	out := make([]*fleet.Checkpoint, 0, len(infos))
	for _, i := range infos {
		out = append(out, describe(i))
	}
	return out, nil
}

func describe(i checkpoint.Info) *fleet.Checkpoint {
	return &fleet.Checkpoint{
		ID: i.ID, Time: i.Time, Trigger: i.Trigger, Files: i.Files, Bytes: i.Bytes, UploadedBytes: i.UploadedBytes,
		OpenCodeVersion: i.OpenCodeVersion, Generation: i.Generation, Node: i.Node, Notes: i.Notes,
	}
}

// Find returns the checkpoint that an id, or a prefix of only one, means; the
// newest for the empty one. Returns NOT_FOUND.
func (s *Session) Find(ctx context.Context, id string) (*fleet.Checkpoint, error) {
	ctx, cancel := bound(ctx, askBound)
	defer cancel()
	id, err := s.inner.Find(ctx, id)
	if err != nil {
		return nil, explain(ctx, s.config, err)
	}
	m, err := s.inner.Manifest(ctx, id)
	if err != nil {
		return nil, explain(ctx, s.config, err)
	}
	return describe(m.Info), nil
}

// Sibling is another folder of the same root.
func (s *Session) Sibling(prefix string) *Session {
	return &Session{config: s.config, bucket: s.bucket, inner: s.bucket.repo.Session(prefix), prefix: prefix}
}

// WriteTar writes what a checkpoint holds below a path as a tar archive.
func (s *Session) WriteTar(ctx context.Context, id, path string, w io.Writer) error {
	return words(s.config, s.inner.WriteTar(ctx, id, path, w))
}

// Copy makes a checkpoint of another session of the same root the first one of
// this session, which is not stored yet. Its generation is set to that of the session
// that was purged there, if one was. Returns FAILED_PRECONDITION if something is there
// already.
func (s *Session) Copy(ctx context.Context, from *Session, id string, to *fleet.Session) error {
	ctx, cancel := bound(ctx, askBound)
	defer cancel()
	record, err := Record(to)
	if err != nil {
		return err
	}
	head, err := s.inner.Head(ctx)
	if err != nil && !errors.Is(err, checkpoint.ErrNotFound) {
		return explain(ctx, s.config, err)
	}
	to.Generation = head.Owner.Generation
	_, err = s.inner.CopyFrom(ctx, from.inner, id, owner(to), checkpoint.Meta{
		Trigger: "fork", OpenCodeVersion: to.OpenCodeVersion, SessionJSON: record, Mode: string(to.Spec.Storage.Mode),
	})
	return explain(ctx, s.config, err)
}

// owner of a session that no node has yet.
func owner(s *fleet.Session) checkpoint.Owner {
	return checkpoint.Owner{SessionID: s.ID, SessionUID: s.UID, Generation: s.Generation}
}

// Discard takes back what Copy has made for a session that is not stored. What another
// session has made there meanwhile stays.
func (s *Session) Discard(ctx context.Context, to *fleet.Session) error {
	ctx, cancel := bound(ctx, askBound)
	defer cancel()
	return explain(ctx, s.config, s.inner.Discard(ctx, owner(to)))
}

// Record is a session as its checkpoints keep it, so that it can be made again from
// nothing else. Keys are not in it.
func Record(s *fleet.Session) ([]byte, error) {
	spec := protoconv.Spec(s.Spec)
	if own := spec.GetStorage().GetS3(); own != nil {
		own.AccessKeyId = ""
	}
	return recordOptions.Marshal(&cloudcodev1.Session{
		Name: protoconv.SessionName(s.ID), Uid: s.UID, Labels: s.Labels, Spec: spec,
	})
}
