package cli

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// secretKeyEnv holds the secret key of a session's own bucket. It is no flag:
// arguments of a process can be seen by everybody on the machine.
const secretKeyEnv = "SESSION_S3_SECRET_ACCESS_KEY"

var storageModes = []string{"auto", "local", "mount", "snapshot"}

// storageFlags say where a new session's files are kept. The bucket's flags are
// read from SESSION_S3_…, not from S3_…: those are the server's own, and what is
// meant for it must not decide a session by accident.
type storageFlags struct {
	mode, profile, prefix string
	s3                    cloudcodev1.S3Storage
	secretFile            string
}

func (s *storageFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.mode, "storage-mode", "", "how files are kept, `MODE`: auto (the default), snapshot, mount or local")
	f.StringVar(&s.profile, "storage-profile", "", "`NAME` of one of the server's storage profiles (see \"cloudcode storage profiles\"; default: the server's default)")
	f.StringVar(&s.prefix, "storage-prefix", "", "`FOLDER` of the session in the bucket; \"\" is all of it, as the original project has it (default: the session's id)")
	f.StringVar(&s.s3.Endpoint, "s3-endpoint", "", "`ADDRESS` of object storage of the session's own, instead of a profile, such as https://fly.storage.tigris.dev")
	f.StringVar(&s.s3.Bucket, "s3-bucket", "", "`BUCKET` of the session's own")
	f.StringVar(&s.s3.Region, "s3-region", "", "region of that bucket (default: auto)")
	f.BoolVar(&s.s3.PathStyle, "s3-path-style", false, "the bucket is part of the path, not of the host name")
	f.StringVar(&s.s3.Prefix, "s3-prefix", "", "`FOLDER` in that bucket that everything is below")
	f.StringVar(&s.s3.AccessKeyId, "s3-access-key-id", "", "access key `ID` for that bucket")
	f.StringVar(&s.secretFile, "s3-secret-access-key-file", "", "`FILE` with the secret key for that bucket, - for stdin (default: $"+secretKeyEnv+"); never an argument, which others could see")
	f.StringVar(&s.s3.TigrisfsArgs, "tigrisfs-args", "", "further `ARGUMENTS` of TigrisFS for that bucket, as a shell would read them")
	for _, name := range []string{"s3-endpoint", "s3-bucket", "s3-region", "s3-path-style", "s3-prefix", "s3-access-key-id", "s3-secret-access-key-file", "tigrisfs-args"} {
		SetEnvName(f, name, "SESSION_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_")))
	}
	complete(cmd, "storage-mode", storageModes...)
	_ = cmd.RegisterFlagCompletionFunc("storage-profile", completeProfiles)
	_ = cmd.MarkFlagFilename("s3-secret-access-key-file")
}

// storage returns what the flags ask for; nil if they ask for nothing.
func (s *storageFlags) storage(cmd *cobra.Command) (*cloudcodev1.Storage, error) {
	given := cmd.Flags().Changed
	out := &cloudcodev1.Storage{Profile: s.profile}
	if s.mode != "" {
		if !slices.Contains(storageModes, strings.ToLower(s.mode)) {
			return nil, usagef("--storage-mode %q: want %s", s.mode, orList(storageModes))
		}
		out.Mode = cloudcodev1.Storage_Mode(cloudcodev1.Storage_Mode_value[strings.ToUpper(s.mode)])
	}
	if given("storage-prefix") {
		out.Prefix = proto.String(strings.Trim(s.prefix, "/"))
	}
	own := false
	for _, name := range []string{"s3-endpoint", "s3-bucket", "s3-region", "s3-path-style", "s3-prefix", "s3-access-key-id", "s3-secret-access-key-file", "tigrisfs-args"} {
		own = own || given(name)
	}
	local := out.GetMode() == cloudcodev1.Storage_LOCAL
	switch {
	case own && s.profile != "":
		return nil, usagef("--storage-profile names a bucket of the server's and --s3-… one of the session's own: give one of them")
	case local && (own || s.profile != "" || out.Prefix != nil):
		return nil, usagef("--storage-mode local keeps files on the node's disk: it takes no profile, prefix or bucket")
	case own:
		var err error
		if out.S3, err = s.ownBucket(cmd.InOrStdin()); err != nil {
			return nil, err
		}
	}
	if proto.Equal(out, &cloudcodev1.Storage{}) {
		return nil, nil
	}
	return out, nil
}

func (s *storageFlags) ownBucket(stdin io.Reader) (*cloudcodev1.S3Storage, error) {
	secret, err := readSecretKey(s.secretFile, stdin)
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, f := range []struct{ value, name string }{
		{s.s3.GetEndpoint(), "--s3-endpoint"},
		{s.s3.GetBucket(), "--s3-bucket"},
		{s.s3.GetAccessKeyId(), "--s3-access-key-id"},
		{secret, "--s3-secret-access-key-file (or $" + secretKeyEnv + ")"},
	} {
		if f.value == "" {
			missing = append(missing, f.name)
		}
	}
	if len(missing) > 0 {
		return nil, usagef("a bucket of the session's own also needs %s", strings.Join(missing, ", "))
	}
	out := proto.CloneOf(&s.s3)
	out.SecretAccessKey = secret
	return out, nil
}

// keyFlags renew the keys of a session's own bucket. They are not read from the
// environment: what is there for creates must not change sessions that are.
type keyFlags struct{ id, secretFile string }

func (k *keyFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&k.id, "s3-access-key-id", "", "new access key `ID` for the session's own bucket")
	f.StringVar(&k.secretFile, "s3-secret-access-key-file", "", "`FILE` with the new secret key for it, - for stdin")
	SetEnvName(f, "s3-access-key-id", "")
	SetEnvName(f, "s3-secret-access-key-file", "")
	_ = cmd.MarkFlagFilename("s3-secret-access-key-file")
}

func (k *keyFlags) change(stdin io.Reader) (func(*cloudcodev1.Session), []string, error) {
	var paths []string
	secret := ""
	if k.id != "" {
		paths = append(paths, "spec.storage.s3.access_key_id")
	}
	if k.secretFile != "" {
		var err error
		if secret, err = readSecretKey(k.secretFile, stdin); err != nil {
			return nil, nil, err
		}
		paths = append(paths, "spec.storage.s3.secret_access_key")
	}
	return func(s *cloudcodev1.Session) {
		s3 := s.GetSpec().GetStorage().GetS3()
		if s3 == nil {
			return
		}
		if k.id != "" {
			s3.AccessKeyId = k.id
		}
		s3.SecretAccessKey = secret
	}, paths, nil
}

// readSecretKey reads the secret key from a file (- is stdin), or takes it from
// the environment; empty if it is nowhere.
func readSecretKey(file string, stdin io.Reader) (string, error) {
	switch file {
	case "":
		return strings.TrimSpace(os.Getenv(secretKeyEnv)), nil
	case "-":
		if interactive(stdin) {
			return "", usagef("--s3-secret-access-key-file -: there is nothing to read on stdin; pipe the key in, or name a file")
		}
		data, err := io.ReadAll(io.LimitReader(stdin, 4<<10))
		line, _, _ := strings.Cut(strings.TrimSpace(string(data)), "\n")
		if err != nil || line == "" {
			return "", usagef("--s3-secret-access-key-file -: there is no key on stdin")
		}
		return strings.TrimSpace(line), nil
	}
	key, err := readLine(file)
	if err != nil {
		return "", usagef("--s3-secret-access-key-file: %w", err)
	}
	if key == "" {
		return "", usagef("--s3-secret-access-key-file %s is empty", file)
	}
	return key, nil
}

// orList is `a, b or c`.
func orList(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// notPersistent is what people are told of a session that lives on one disk only.
const notPersistent = "not persistent (local disk)"

// storageColumn is a session's storage mode in one word.
func storageColumn(st *cloudcodev1.StorageStatus) string {
	switch st.GetMode() {
	case cloudcodev1.Storage_MODE_UNSPECIFIED:
		return ""
	case cloudcodev1.Storage_LOCAL:
		return "local disk"
	}
	return strings.ToLower(st.GetMode().String())
}

// savedColumn says how far a session is saved.
func savedColumn(st *cloudcodev1.StorageStatus, now time.Time) string {
	switch {
	case st.GetMode() == cloudcodev1.Storage_MODE_UNSPECIFIED:
		return ""
	case st.GetMode() == cloudcodev1.Storage_LOCAL || !st.GetPersistent():
		return "not persistent"
	case st.GetUnsavedSince() != nil:
		return "UNSAVED for " + age(now, st.GetUnsavedSince())
	case st.GetMountState() == cloudcodev1.StorageStatus_MOUNT_FAILED:
		return "MOUNT FAILED"
	case st.GetMountState() == cloudcodev1.StorageStatus_REMOUNTING:
		return "remounting"
	case st.GetCheckpoint() == nil:
		return "no checkpoint yet"
	}
	return age(now, st.GetCheckpoint().GetCreateTime()) + " ago"
}

// describeStorage is the part of a session's description about its storage.
func describeStorage(st *cloudcodev1.StorageStatus, now time.Time) []field {
	if st.GetMode() == cloudcodev1.Storage_MODE_UNSPECIFIED {
		return nil // not decided yet, or an older server
	}
	where := storageColumn(st)
	switch {
	case st.GetMode() == cloudcodev1.Storage_LOCAL:
		where = notPersistent + ": lost with its node"
	case st.GetUri() != "":
		where += " in " + st.GetUri()
	}
	saved := ""
	if c := st.GetCheckpoint(); c != nil {
		saved = timeAndAge(now, c.GetCreateTime()) + "\n" + checkpointText(c)
	}
	unsaved := ""
	if st.GetUnsavedSince() != nil {
		unsaved = timeAndAge(now, st.GetUnsavedSince())
	}
	mount := ""
	switch st.GetMountState() {
	case cloudcodev1.StorageStatus_MOUNTED:
		mount = "mounted"
	case cloudcodev1.StorageStatus_REMOUNTING:
		mount = "does not answer, being mounted anew"
	case cloudcodev1.StorageStatus_MOUNT_FAILED:
		mount = "cannot be mounted, being tried again"
	}
	if mount != "" && st.GetMounter() != "" {
		mount += " (" + st.GetMounter() + ")"
	}
	return []field{
		{"Storage", where},
		{"Checkpoint", saved},
		{"Unsaved since", unsaved},
		{"Mount", mount},
		{"Storage problem", st.GetMessage()},
	}
}

// checkpointText sums a checkpoint up in one line.
func checkpointText(c *cloudcodev1.Checkpoint) string {
	out := []string{c.GetId()}
	if c.GetFiles() > 0 || c.GetBytes() > 0 {
		out = append(out, formatBytes(c.GetBytes())+" in "+plural(c.GetFiles(), "file", "files"))
	}
	if c.GetUploadedBytes() > 0 {
		out = append(out, formatBytes(c.GetUploadedBytes())+" sent")
	}
	text := strings.Join(out, ", ")
	if c.GetTrigger() != "" {
		text += " (" + c.GetTrigger() + ")"
	}
	return text
}

func plural(n int64, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, more)
}
