package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/cloudcode-dev/cloudcode/cmd/cloudcode/internal/cli"
	"github.com/cloudcode-dev/cloudcode/image"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server"
)

const defaultGRPCListen = "127.0.0.1:7443"

// serverFlags are the flags of every command that runs a server.
type serverFlags struct {
	grpcListen, defaultImage string
	storageProfiles          string
	ownStorage               string
	advertise                []string
}

func (f *serverFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.grpcListen, "grpc-listen", defaultGRPCListen, "address of the gRPC listener, for clients, nodes and gateways")
	fl.StringVar(&f.defaultImage, "image", image.DefaultRef, "image of sessions that name none")
	fl.StringVar(&f.storageProfiles, "storage-profiles", "", "JSON `FILE` with named object storage, beside the one that S3_ENDPOINT and the other variables configure")
	_ = cmd.MarkFlagFilename("storage-profiles", "json")
	fl.StringVar(&f.ownStorage, "own-storage", string(storage.OwnPublic), "what buckets of their own sessions may bring: deny, public (at addresses of the public internet) or any (all that server and nodes can reach)")
	_ = cmd.RegisterFlagCompletionFunc("own-storage", cobra.FixedCompletions([]string{string(storage.OwnDeny), string(storage.OwnPublic), string(storage.OwnAny)}, cobra.ShellCompDirectiveNoFileComp))
	fl.StringSliceVar(&f.advertise, "advertise", nil, "further name or address of this server, for its certificate; can be repeated")
}

func (f *serverFlags) start(ctx context.Context, dataDir string, allowAnonymous bool, log *slog.Logger) (*server.Server, error) {
	profiles, err := f.profiles(os.Getenv)
	if err != nil {
		return nil, err
	}
	own, err := storage.ParseOwnPolicy(f.ownStorage)
	if err != nil {
		return nil, fmt.Errorf("--own-storage: %w", err)
	}
	username, password := credentialsFromEnv()
	s, err := server.New(server.Config{
		DataDir: dataDir, GRPCListen: f.grpcListen, DefaultImage: f.defaultImage, AdvertiseHosts: f.advertise,
		Username: username, Password: password, AllowAnonymous: allowAnonymous,
		StorageProfiles: profiles, OwnStorage: own, Logger: log,
	})
	if err != nil {
		return nil, err
	}
	return s, s.Start(ctx)
}

// profiles are the object storage of the environment, as in the original project,
// and of the file. What is half configured is an error: sessions would end up on
// a disk that nobody meant.
func (f *serverFlags) profiles(getenv func(string) string) (*storage.Profiles, error) {
	env, err := storage.FromEnv(getenv)
	if err != nil {
		return nil, err
	}
	var file map[string]storage.Config
	if f.storageProfiles != "" {
		if file, err = storage.LoadProfiles(f.storageProfiles); err != nil {
			return nil, fmt.Errorf("--storage-profiles: %w", err)
		}
	}
	return storage.NewProfiles(env, file)
}

// storageHelp is for the commands that run a server.
const storageHelp = `Sessions are kept in object storage if S3_ENDPOINT, S3_BUCKET, S3_ACCESS_KEY_ID and
S3_SECRET_ACCESS_KEY are set; S3_REGION, S3_PATH_STYLE, S3_PREFIX and TIGRISFS_ARGS say
more about it, and CLOUDCODE_ENCRYPTION_KEY encrypts checkpoints. Without them files
stay on the disk of one node.`

func newServerCmd() *cobra.Command {
	var f serverFlags
	var allowAnonymous bool
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the server: it keeps the fleet's state and places sessions",
		Long: `Run the server. At first start it makes the fleet's certificate authority and
join token (pki/ below the data directory) and an admin token (server/token),
which the command line on this machine uses by itself.

Basic credentials are taken from SERVER_USERNAME and SERVER_PASSWORD. Without a
password nothing is asked for, and only loopback may be listened on.

` + storageHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dataDir, err := absDataDir(cmd)
			if err != nil {
				return err
			}
			log := cli.Logger(cmd, slog.LevelInfo)
			s, err := f.start(cmd.Context(), dataDir, allowAnonymous, log)
			if err != nil {
				return err
			}
			log.Info("server runs", "address", s.Addr().String())
			failed := waitFor(cmd.Context(), s.Wait)
			return errors.Join(failed, stopBounded(cmd.Context(), s.Stop))
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&allowAnonymous, "allow-anonymous", false, "listen on addresses other than loopback although no SERVER_PASSWORD is set")
	return cmd
}
