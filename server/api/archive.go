package api

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/storage"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	s3Dir      = "/root/s3"
	projectDir = s3Dir + "/workspace/project"

	archiveChunk = 256 << 10 // of one message
	maxPath      = 4 << 10
)

// treePath returns a path of the API relative to /root/s3; empty for all of it.
func treePath(v *violations, p string) string {
	if p == "" {
		return ""
	}
	full := path.Clean(p)
	if !path.IsAbs(full) {
		full = path.Join(projectDir, p)
	}
	rel, ok := strings.CutPrefix(full+"/", s3Dir+"/")
	switch {
	case len(p) > maxPath || strings.ContainsRune(p, 0):
		v.add("path", fmt.Sprintf("must be at most %d bytes without a NUL character", maxPath))
	case !ok:
		v.add("path", fmt.Sprintf("%q must be below %s, or relative to %s", short(p), s3Dir, projectDir))
	}
	return strings.TrimSuffix(rel, "/")
}

// ReadArchive implements SessionService.
func (s *Sessions) ReadArchive(req *cloudcodev1.ReadArchiveRequest, stream grpc.ServerStreamingServer[cloudcodev1.ReadArchiveResponse]) error {
	ctx := stream.Context()
	var v violations
	rel := treePath(&v, req.GetPath())
	if err := v.err(); err != nil {
		return err
	}
	sess, err := s.get(ctx, req.GetName())
	if err != nil {
		return err
	}
	onNode, ready := sess.Assignment != nil, false
	if onNode {
		if err := s.config.Store.View(ctx, func(tx store.ReadTx) error {
			n, err := tx.Node(sess.Assignment.Node)
			ready = err == nil && n.State == fleet.NodeReady
			if errors.Is(err, fleet.ErrNotFound) {
				return nil
			}
			return err
		}); err != nil {
			return err
		}
	}
	switch {
	case req.GetCheckpoint() == "" && ready:
		return s.readFromNode(sess, req, stream)
	case sess.Spec.Storage.Remote():
		return s.readFromStorage(sess, rel, req.GetCheckpoint(), stream)
	case req.GetCheckpoint() != "":
		_, err := s.config.Storage.Session(sess.Spec.Storage) // says why not
		return err
	case onNode:
		return grpcerr.New(codes.Unavailable, reasonUnreachable, "node %s, which alone has the files of session %q, cannot be reached: try again when it is back", sess.Assignment.Node, sess.ID)
	}
	return grpcerr.New(codes.FailedPrecondition, reasonNotPlaced, "session %q is on no node yet, so there are no files: %s", sess.ID, sess.Message)
}

func (s *Sessions) readFromNode(sess *fleet.Session, req *cloudcodev1.ReadArchiveRequest, stream grpc.ServerStreamingServer[cloudcodev1.ReadArchiveResponse]) error {
	agent, node, err := s.agent(stream.Context(), sess)
	if err != nil {
		return err
	}
	from, err := agent.ReadArchive(stream.Context(), &nodev1.ReadArchiveRequest{SessionId: sess.ID, Path: req.GetPath()})
	if err != nil {
		return nodeError(sess.ID, node, err)
	}
	for {
		got, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return nodeError(sess.ID, node, err)
		}
		if err := stream.Send(&cloudcodev1.ReadArchiveResponse{Data: got.GetData(), EstimatedBytes: got.GetEstimatedBytes()}); err != nil {
			return err
		}
	}
}

func (s *Sessions) readFromStorage(sess *fleet.Session, rel, id string, stream grpc.ServerStreamingServer[cloudcodev1.ReadArchiveResponse]) error {
	ctx := stream.Context()
	if sess.Spec.Storage.Mode == fleet.ModeMount && rel != ".opencode" && !strings.HasPrefix(rel, ".opencode/") {
		return grpcerr.New(codes.FailedPrecondition, reasonMount, "session %q is on the bucket itself (storage mode MOUNT): its checkpoints hold %s/.opencode alone, and its files are the objects of %s. Read them there, or resume the session", sess.ID, s3Dir, sess.Spec.Storage.URI())
	}
	stored, err := s.config.Storage.Session(sess.Spec.Storage)
	if err != nil {
		return err
	}
	c, err := stored.Find(ctx, id)
	if id == "" && grpcerr.Reason(err) == storage.ReasonNoCheckpoint {
		return grpcerr.New(codes.FailedPrecondition, storage.ReasonNoCheckpoint, "session %q is on no node, and was never saved: there are no files to read", sess.ID)
	} else if err != nil {
		return err
	}
	chunks := &archiveWriter{stream: stream}
	if rel == "" {
		chunks.estimate = c.Bytes
	}
	// Buffered: a tar writer writes in small pieces. Copied by Send, so that the
	// buffer can be used again.
	buffered := bufio.NewWriterSize(chunks, archiveChunk)
	if err := stored.WriteTar(ctx, c.ID, rel, buffered); err != nil {
		if grpcerr.Reason(err) == storage.ReasonNoCheckpoint { // the checkpoint was found above
			return grpcerr.New(codes.NotFound, reasonNoPath, "checkpoint %s of session %q has nothing at %s", c.ID, sess.ID, path.Join(s3Dir, rel))
		}
		return err
	}
	return buffered.Flush()
}

// archiveWriter sends what is written, in messages that are not too large.
type archiveWriter struct {
	stream   grpc.ServerStreamingServer[cloudcodev1.ReadArchiveResponse]
	estimate int64 // for the first message
}

func (w *archiveWriter) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), archiveChunk)
		if err := w.stream.Send(&cloudcodev1.ReadArchiveResponse{Data: rest[:n], EstimatedBytes: w.estimate}); err != nil {
			return len(p) - len(rest), err
		}
		rest, w.estimate = rest[n:], 0
	}
	return len(p), nil
}

// WriteArchive implements SessionService. What comes is passed on message by
// message: a node that is slow slows the caller down.
func (s *Sessions) WriteArchive(stream grpc.ClientStreamingServer[cloudcodev1.WriteArchiveRequest, cloudcodev1.WriteArchiveResponse]) error {
	ctx := stream.Context()
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		first, err = &cloudcodev1.WriteArchiveRequest{}, nil
	}
	if err != nil {
		return err
	}
	var v violations
	treePath(&v, first.GetPath())
	if first.GetName() == "" {
		v.add("name", "is missing: the first message names the session")
	}
	if err := v.err(); err != nil {
		return err
	}
	sess, err := s.get(ctx, first.GetName())
	if err != nil {
		return err
	}
	if sess.Assignment == nil || sess.State != fleet.StateRunning {
		return grpcerr.New(codes.FailedPrecondition, reasonNotRunning, "session %q is %s: files are written into a session that runs", sess.ID, sess.State)
	}
	agent, node, err := s.agent(ctx, sess)
	if err != nil {
		return err
	}
	to, err := agent.WriteArchive(ctx)
	if err != nil {
		return nodeError(sess.ID, node, err)
	}
	folder := first.GetPath()
	if folder == "" {
		folder = s3Dir
	}
	next := &nodev1.WriteArchiveRequest{SessionId: sess.ID, Path: folder, Data: first.GetData()}
	for {
		// EOF: the node has answered already, and CloseAndRecv says what.
		if err := to.Send(next); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nodeError(sess.ID, node, err)
		}
		got, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		next = &nodev1.WriteArchiveRequest{Data: got.GetData()}
	}
	resp, err := to.CloseAndRecv()
	if err != nil {
		return nodeError(sess.ID, node, err)
	}
	return stream.SendAndClose(&cloudcodev1.WriteArchiveResponse{Files: resp.GetFiles(), Bytes: resp.GetBytes()})
}
