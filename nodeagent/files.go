package nodeagent

import (
	"bufio"
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/nodeagent/archive"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/worker"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// archivePiece is how much of an archive one message has.
const archivePiece = 256 << 10

func notHere(session string) error {
	return grpcerr.New(codes.NotFound, "SESSION_NOT_HERE", "session %s is not on this node", session)
}

// filesError says what an error of a session's files means to the user.
func filesError(session string, err error) error {
	code, reason := codes.Internal, "FILES_FAILED"
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		code, reason = codes.Canceled, "CANCELED"
	case errors.Is(err, context.DeadlineExceeded):
		code, reason = codes.DeadlineExceeded, "TIMED_OUT"
	case errors.Is(err, archive.ErrNotFound):
		code, reason = codes.NotFound, "FILE_NOT_FOUND"
	case errors.Is(err, archive.ErrInvalid):
		code, reason = codes.InvalidArgument, "INVALID_ARCHIVE"
	case errors.Is(err, archive.ErrNoSpace):
		code, reason = codes.ResourceExhausted, "DISK_FULL"
	case errors.Is(err, runtime.ErrNotFound):
		return grpcerr.New(codes.FailedPrecondition, "SESSION_NOT_RUNNING", "session %s does not run now: resume it, or wait until it is ready", session)
	case errors.Is(err, worker.ErrNoStorage):
		return grpcerr.New(codes.FailedPrecondition, "NO_STORAGE", "session %s has no object storage to be saved to", session)
	case errors.Is(err, checkpoint.ErrFenced):
		code, reason = codes.FailedPrecondition, "FENCED"
	case errors.Is(err, objstore.ErrNotAllowed):
		code, reason = codes.FailedPrecondition, worker.ReasonStorageNotAllowed
	case errors.Is(err, objstore.ErrUnavailable):
		code, reason = codes.Unavailable, "STORAGE_UNREACHABLE"
	case errors.Is(err, objstore.ErrDenied), errors.Is(err, objstore.ErrNoBucket), errors.Is(err, objstore.ErrRegion):
		code, reason = codes.FailedPrecondition, "STORAGE_DENIED"
	}
	return grpcerr.New(code, reason, "session %s: %v", session, err)
}

func (s *service) Checkpoint(ctx context.Context, req *nodev1.CheckpointRequest) (*nodev1.CheckpointResponse, error) {
	w, ok := s.agent.worker(req.GetSessionId())
	if !ok {
		return nil, notHere(req.GetSessionId())
	}
	ctx, cancel := whileHere(ctx, w)
	defer cancel()
	c, err := w.Checkpoint(ctx, req.GetTrigger())
	if err != nil {
		return nil, filesError(req.GetSessionId(), err)
	}
	return &nodev1.CheckpointResponse{Checkpoint: c}, nil
}

func (s *service) ReadArchive(req *nodev1.ReadArchiveRequest, stream grpc.ServerStreamingServer[nodev1.ReadArchiveResponse]) error {
	w, ok := s.agent.worker(req.GetSessionId())
	if !ok {
		return notHere(req.GetSessionId())
	}
	ctx, cancel := whileHere(stream.Context(), w)
	defer cancel()
	return filesError(req.GetSessionId(), func() error {
		rel, err := archive.Path(req.GetPath())
		if err != nil {
			return err
		}
		tree, err := w.Files(ctx)
		if err != nil {
			return err
		}
		defer tree.Root.Close()
		size, err := tree.Size(ctx, rel)
		if err != nil {
			return err
		}
		if err := stream.Send(&nodev1.ReadArchiveResponse{EstimatedBytes: size}); err != nil {
			return err
		}
		out := bufio.NewWriterSize(writerFunc(func(p []byte) error {
			return stream.Send(&nodev1.ReadArchiveResponse{Data: p})
		}), archivePiece)
		if err := tree.Write(ctx, rel, out); err != nil {
			return err
		}
		return out.Flush()
	}())
}

func (s *service) WriteArchive(stream grpc.ClientStreamingServer[nodev1.WriteArchiveRequest, nodev1.WriteArchiveResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	w, ok := s.agent.worker(first.GetSessionId())
	if !ok {
		return notHere(first.GetSessionId())
	}
	ctx, cancel := whileHere(stream.Context(), w)
	defer cancel()
	var resp nodev1.WriteArchiveResponse
	err = filesError(first.GetSessionId(), func() error {
		rel, err := archive.Path(first.GetPath())
		if err != nil {
			return err
		}
		if !w.Serving() {
			return runtime.ErrNotFound
		}
		tree, err := w.Files(ctx)
		if err != nil {
			return err
		}
		defer tree.Root.Close()
		in := &archiveReader{next: func() ([]byte, error) {
			m, err := stream.Recv()
			return m.GetData(), err
		}, rest: first.GetData()}
		if resp.Files, resp.Bytes, err = tree.Extract(ctx, rel, in); err != nil {
			return err
		}
		// What follows the archive's end is padding.
		_, err = io.Copy(io.Discard, in)
		return err
	}())
	if err != nil {
		return err
	}
	return stream.SendAndClose(&resp)
}

type writerFunc func([]byte) error

func (f writerFunc) Write(p []byte) (int, error) {
	if err := f(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// archiveReader reads the data of a stream of messages.
type archiveReader struct {
	next func() ([]byte, error)
	rest []byte
}

func (r *archiveReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		data, err := r.next()
		if err != nil {
			return 0, err
		}
		r.rest = data
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
